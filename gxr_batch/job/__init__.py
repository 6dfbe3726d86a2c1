"""The job file: its sections as frozen models, how it is read, and what is said where it is wrong."""

from gxr_batch.job.api import ApiSection
from gxr_batch.job.finetuning import FinetuneSection
from gxr_batch.job.ray import RaySection
from gxr_batch.job.reading import load_job, make_job, recorded_job
from gxr_batch.job.sections import (
    EchoSection,
    EngineSection,
    InputSection,
    Job,
    ModelSection,
    PromptSection,
    RunSection,
    SamplingSection,
    Screening,
)

__all__ = [
    "ApiSection",
    "EchoSection",
    "EngineSection",
    "FinetuneSection",
    "InputSection",
    "Job",
    "ModelSection",
    "PromptSection",
    "RaySection",
    "RunSection",
    "SamplingSection",
    "Screening",
    "load_job",
    "make_job",
    "recorded_job",
]
