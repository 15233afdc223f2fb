"""From a teacher's settings to the teacher: each backend is imported only where it is used."""

from foundry.settings import TeacherSettings
from foundry.teacher import Teacher


def make_teacher(settings: TeacherSettings) -> Teacher:
    """The teacher behind its backend. Raises UserError where its key, its model or a library is missing."""
    match settings.backend:
        case "openai":
            from foundry.teachers.openai import OpenAITeacher

            return OpenAITeacher(settings)
        case "opencode":
            from foundry.teachers.opencode import OpenCodeTeacher

            return OpenCodeTeacher(settings)
        case "transformers":
            from foundry.teachers.transformers import TransformersTeacher

            return TransformersTeacher(settings)
        case "local":
            from foundry.teachers.local import LocalTeacher

            return LocalTeacher(settings)
