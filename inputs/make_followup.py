"""Writes followup.parquet: forty invented follow-up, intensive care and children's films, with typed columns.

python inputs/make_followup.py
"""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

# age in years (None: a baby or not stated), sex, history, presentation, findings, comparison
CASES = [
    (71, "male", "bypass surgery", None, "Small bilateral effusions. Both lung bases show band atelectasis. Wires aligned.", "effusions smaller than on day one"),
    (66, "female", "septic shock", None, "The endotracheal tube ends 5 cm above the carina. Diffuse bilateral airspace opacities. No pneumothorax.", "opacities denser than yesterday"),
    (58, "male", "pancreatitis", "worsening oxygenation", "Bilateral patchy opacities without cardiomegaly or septal lines, in keeping with lung injury.", None),
    (49, "female", "drug overdose", "control after intubation", "The tube tip lies at the carina. Right upper lobe atelectasis. The left lung is clear.", None),
    (80, "male", "hip fracture", "sudden breathlessness", "Clear lungs. The right hemidiaphragm is raised. No effusion. Heart size normal.", "unchanged since admission"),
    (62, "male", "lung resection on the right", None, "The right hemithorax is filling with fluid and the mediastinum moves to the right, as expected.", "air-fluid level higher than last week"),
    (44, "female", "lung transplantation", "fever", "New nodular opacities in the left upper lobe. No effusion. Clips at both hila.", "lungs were clear one month ago"),
    (37, "male", "stab wound", "control after drain removal", "A tiny right apical pneumothorax of 5 mm. No fluid. The lung is otherwise expanded.", "slightly larger than with the drain in place"),
    (69, "female", "heart failure", None, "Septal lines have cleared. A trace of fluid remains in the left costophrenic angle.", "much improved since three days ago"),
    (73, "male", "renal failure treated by dialysis", None, "A tunnelled right jugular catheter ends in the right atrium, without a kink. No pneumothorax. No oedema.", None),
    (54, "male", "liver cirrhosis", "breathlessness", "Moderate right effusion with passive atelectasis. The left side is clear.", "recurred since drainage two weeks ago"),
    (28, "female", "cystic fibrosis", "a new exacerbation", "Bronchiectasis of both upper lobes with mucus plugging. Hyperinflation. No pneumothorax.", "more plugging than six months ago"),
    (33, "male", "tuberculosis under treatment", None, "The right apical cavity has closed to a scar. No new opacity.", "cavity of 3 cm four months ago"),
    (60, "female", "a balloon pump", None, "The marker of the balloon pump lies 2 cm below the aortic knob. Mild oedema.", None),
    (76, "male", "chronic bronchitis", "purulent sputum", "There is peribronchial thickening at both bases. The hemidiaphragms are flattened. No consolidation and no effusion.", "no change over two years"),
    (51, "male", "sarcoidosis", None, "Hilar nodes are smaller. Fine nodular opacities in the mid zones persist.", "hilar nodes were larger a year ago"),
    (46, "female", "pulmonary hypertension", None, "The central pulmonary arteries are enlarged and the peripheral vessels are pruned. The lungs are clear. No effusion.", None),
    (65, "female", "chemotherapy", "a swollen arm", "The port catheter has fractured below the clavicle. Its distal part lies in the right ventricle.", "catheter was intact at insertion"),
    (57, "male", "oesophagectomy", None, "Gastric conduit with an air-fluid level right of the mediastinum. No leak is visible on the plain film.", None),
    (82, "female", "atrial fibrillation", "cough", "The mitral ring is calcified and the heart is mildly enlarged. No oedema, no effusion and no consolidation.", "stable for five years"),
    (None, "male", "birth at term", "fast breathing after caesarean section", "Mild hyperinflation, streaky perihilar markings and fluid in the fissure. Likely wet lung.", None),
    (None, "female", "meconium-stained fluid", "respiratory distress", "Coarse patchy opacities with areas of hyperinflation. A small right pneumothorax.", None),
    (None, "male", "premature birth, ventilated for six weeks", None, "Coarse reticular pattern with cystic lucencies in both lungs. The heart is normal.", "pattern coarser than two weeks ago"),
    (None, "female", "a scaphoid abdomen at birth", "cyanosis", "Gas-filled bowel loops fill the left hemithorax and push the heart to the right.", None),
    (1, "female", None, "a noisy chest for a week", "Peribronchial cuffing with mild hyperinflation of both lungs. No focal consolidation. No effusion and no air trapping on one side.", None),
    (4, "male", None, "drooling after swallowing a coin", "A round metallic disc lies face-on at the thoracic inlet, in the oesophagus. Lungs clear.", None),
    (9, "female", "sickle cell disease", "chest pain and fever", "New consolidation in the left lower lobe. The heart is enlarged. H-shaped vertebrae are seen. No effusion.", "lower lobe was clear last year"),
    (12, "male", None, "swollen neck nodes", "Large anterior mediastinal mass on both sides of the midline. The trachea is narrowed.", None),
    (6, "male", "ventricular septal defect", None, "The heart is enlarged and the pulmonary vessels are prominent to the periphery. No oedema and no effusion.", "heart slightly smaller since surgery"),
    (15, "female", "scoliosis", None, "Right convex thoracic curve with rods in place. No hardware fracture. Lungs clear.", "curve corrected compared with before surgery"),
    (10, "male", "asthma", "acute wheeze", "Hyperinflation and a band of gas along the left heart border: pneumomediastinum. No pneumothorax.", None),
    (8, "female", "pneumonia", "persistent fever", "The right effusion now has a lens-shaped outline against the chest wall and the adjacent lung is collapsed. Empyema is likely. No pneumothorax.", "effusion larger than two days ago"),
    (41, "male", "near-drowning", None, "Bilateral perihilar opacities, less dense at the periphery. Heart size normal.", "clearing since yesterday"),
    (70, "female", "amiodarone treatment", "dry cough", "Peripheral opacities of the right upper lobe and both bases. No effusion.", "new since last year"),
    (59, "male", "asbestos exposure", None, "Calcified pleural plaques along both hemidiaphragms and lateral walls. No mass. No effusion.", "unchanged for four years"),
    (67, "male", "silicosis", None, "Eggshell calcification of hilar nodes and upper zone masses with distortion.", "masses slightly larger over three years"),
    (25, "female", None, "two weeks of cough", "Patchy opacity in the right lower lobe with loss of the hemidiaphragm.", None),
    (53, "female", "breast radiotherapy", None, "Volume loss and linear opacities at the left apex with a straight margin, after radiation.", "more fibrotic than six months ago"),
    (64, "male", "a treated lung abscess", None, "Thin-walled residual cyst of 2 cm in the right upper lobe. No fluid level.", "fluid level has gone since last month"),
    (77, "male", "thyroid goitre", None, "Smooth mass of the superior mediastinum on the left that displaces the trachea to the right.", "unchanged since two years ago"),
]  # fmt: skip


def table() -> pa.Table:
    """Return the cases as typed columns."""
    age, sex, history, presentation, findings, comparison = (list(column) for column in zip(*CASES, strict=True))
    return pa.table(
        {
            "case_id": [f"FU-{number:04d}" for number in range(1, len(CASES) + 1)],
            "age": pa.array(age, pa.int64()),
            "sex": pa.array(sex, pa.string()),
            "history": pa.array(history, pa.string()),
            "presentation": pa.array(presentation, pa.string()),
            "findings": pa.array(findings, pa.string()),
            "comparison": pa.array(comparison, pa.string()),
        }
    )


if __name__ == "__main__":
    pq.write_table(table(), Path(__file__).with_name("followup.parquet"))
