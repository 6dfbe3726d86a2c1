"""Words that are no person's and no hospital's name though a capital begins them, as radiology reports use them.

Reports stand in capitals often enough that a capital alone says little: "HISTORY OF MS. HEART SIZE IS NORMAL".
"""

from __future__ import annotations

_WORDS = """
a an the this that these those there here it its he she they we you i his her their our your who which what when where
and or but nor not no yes if as at by for from in into of on onto off over per to under up with without within via than
then is are was were be been being has have had do does did may might can could should would will shall must
also again any all both each either neither some other another same such more most less least very much many few
first second third fourth fifth last next new old prior previous previously recent recently current earlier later
today yesterday tomorrow now day days week weeks month months year years hour hours minute minutes am pm mm cm ml
please see seen note noted call called discussed notified informed reported read reviewed dictated signed
performed requested ordered compared given known unknown none unremarkable unchanged stable normal abnormal
male female man woman boy girl adult child infant neonate elderly young aged smoker pregnant patient patients pt
unnamed anonymous redacted removed withheld deidentified pending unavailable applicable test demo example
chest lung lungs heart cardiac mediastinum mediastinal pleura pleural hilum hilar rib ribs bone bones spine thorax
thoracic abdomen abdominal pelvis neck head brain breast liver spleen kidney airway trachea tracheal aorta aortic
diaphragm hemidiaphragm clavicle scapula sternum vertebra vertebral shoulder arm knee skull soft tissue tissues
left right upper middle lower bilateral unilateral bibasilar basilar basal apical perihilar peripheral central diffuse
focal patchy mild moderate severe small large minimal marked subtle acute chronic interval increased decreased
anterior posterior lateral medial superior inferior frontal oblique decubitus supine erect upright portable mobile
semierect bedside inspiratory expiratory pa ap lat ll view views film films image images series
sequence plate imaging radiograph radiographs
radiography radiology radiologist radiologists radiological xray x-ray ct cta mr mri mra us pet ultrasound scan scans
angiography angiogram spectroscopy enterography cholangiography mammography fluoroscopy tomography echo detector
pneumonia pneumothorax effusion effusions edema oedema opacity opacities consolidation atelectasis nodule nodules mass
masses fracture fractures lesion lesions disease diseases infiltrate infiltrates cardiomegaly fibrosis emphysema copd
asthma tuberculosis tb cancer carcinoma lymphoma sarcoidosis pain fever cough dyspnea dyspnoea shortness breath trauma
syndrome sign signs line lines tube tubes catheter catheters lead leads device wire wires clip clips drain stent port
pacemaker valve in-place place placement position tip evaluation evaluate assessment assess rule rotated intubated
history indication indications technique comparison findings finding impression conclusion clinical diagnosis
differential recommendation recommendations follow follow-up followup exam examination study studies procedure report
reports result results request question title topic case cases name names date time age sex gender status post
physician physicians doctor doctors nurse nurses surgeon consultant resident attending technologist technician
technologists clinician provider team staff service services department dept ward unit units emergency er ed icu nicu
picu ccu ot or ent gp ob gyn general practitioner manager practice anesthetist anaesthetist specialist secretary
outside outpatient inpatient referring referral local district field tertiary teaching private public rural urban
admitted admission discharged discharge transferred transfer arrival during after before since until following
prolonged lengthy long short entire multiple several single one two three four five six seven eight nine ten
hospital hospitals clinic clinics center centre infirmary university school college care nursing home facility health
system rehabilitation rehab surgery surgical medicine medical memory wound sleep failure transplant dialysis infusion
travel walk-in follow-on screening vaccination smoking weight origin choice residence record records course stay bed
acquired based confirmed consistent concerning suggestive suspected possible probable likely question however
although because while therefore thus overall additionally otherwise
"""
ORDINARY = frozenset(_WORDS.split())
