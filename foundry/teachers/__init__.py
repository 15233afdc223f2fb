"""Who answers: a backend each, behind its limits, several as one."""

from foundry.teachers.backends import make_teacher
from foundry.teachers.ensemble import Call, Ensemble, Outcome
from foundry.teachers.limits import Member, StoppedError

__all__ = [
    "Call",
    "Ensemble",
    "Member",
    "Outcome",
    "StoppedError",
    "make_teacher",
]
