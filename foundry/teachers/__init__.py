"""Who answers: a backend each, behind its limits, several as one."""

from foundry.teachers.backends import make_teacher
from foundry.teachers.ensemble import Ensemble, Outcome
from foundry.teachers.limits import Member, StoppedError
