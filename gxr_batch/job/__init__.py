"""The job file: its sections as frozen models, how it is read, and its error messages."""

from gxr_batch.job.form_section import FORM_VERSION, FormPart, FormSection, SectionKind
from gxr_batch.job.job_file import load_job, make_job, recorded_job
from gxr_batch.job.schema import (
    COMMON,
    PROMPT_VERSION,
    ApiSection,
    EchoSection,
    EngineSection,
    FinetuneSection,
    InputSection,
    Job,
    ModelSection,
    PromptSection,
    RaySection,
    RunSection,
    SamplingSection,
    Screening,
)

__all__ = [
    "COMMON",
    "FORM_VERSION",
    "PROMPT_VERSION",
    "ApiSection",
    "EchoSection",
    "EngineSection",
    "FinetuneSection",
    "FormPart",
    "FormSection",
    "InputSection",
    "Job",
    "ModelSection",
    "PromptSection",
    "RaySection",
    "RunSection",
    "SamplingSection",
    "Screening",
    "SectionKind",
    "load_job",
    "make_job",
    "recorded_job",
]
