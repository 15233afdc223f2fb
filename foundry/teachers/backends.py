"""From a teacher's settings to the teacher: each backend is imported only where it is used."""

from foundry.settings import TeacherSettings
from foundry.teacher import Teacher


def make_teacher(settings: TeacherSettings) -> Teacher:
    """The teacher behind its backend. Raises UserError where its key is not in the environment."""
    match settings.backend:
        case "openai":
            from foundry.teachers.openai import OpenAITeacher

            return OpenAITeacher(
                settings.name,
                model=settings.model,
                base_url=settings.base_url,
                key=settings.key(),
                key_header=settings.key_header,
                timeout_seconds=settings.timeout_seconds,
                logprobs=settings.logprobs,
                max_tokens_key=settings.max_tokens_key,
                omit=settings.omit,
                extra=settings.extra,
            )
        case "opencode":
            from foundry.teachers.opencode import OpenCodeTeacher

            return OpenCodeTeacher(
                settings.name,
                model=settings.model,
                server_url=settings.server_url,
                password=settings.password(),
                agent=settings.agent,
                timeout_seconds=settings.timeout_seconds,
                extra=settings.extra,
                omit=settings.omit,
            )
        case "transformers":
            from foundry.teachers.transformers import TransformersTeacher

            return TransformersTeacher(
                settings.name,
                folder=settings.model,
                device=settings.device,
                dtype=settings.dtype,
                logprobs=settings.logprobs,
                template_values=settings.extra,
            )
        case "local":
            from foundry.teachers.local import LocalTeacher

            return LocalTeacher(settings.name)
