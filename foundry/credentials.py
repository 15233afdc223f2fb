"""What is a secret, by a file's name or by its looks: it is not read into a corpus, not kept, and not shown.

Secrets are found by detect-secrets, by the patterns of its plugins that name a provider: its entropy and keyword
plugins take every hash and every `password = "..."` of a test for a secret. What those patterns cannot know, a Wi-Fi
password say, lies in files that are named for it. Trade-off: a library's module that is named `credentials.py` is left
out as well.
"""

import re
from collections.abc import Iterator
from pathlib import PurePath
from typing import Any

from detect_secrets.plugins import (
    aws,
    azure_storage_key,
    github_token,
    gitlab_token,
    jwt,
    mailchimp,
    npm,
    openai,
    private_key,
    pypi_token,
    sendgrid,
    slack,
    square_oauth,
    stripe,
)

_DETECTORS = (
    aws.AWSKeyDetector(),
    azure_storage_key.AzureStorageKeyDetector(),
    github_token.GitHubTokenDetector(),
    gitlab_token.GitLabTokenDetector(),
    jwt.JwtTokenDetector(),
    mailchimp.MailchimpDetector(),
    npm.NpmDetector(),
    openai.OpenAIDetector(),
    pypi_token.PypiTokenDetector(),
    sendgrid.SendGridDetector(),
    slack.SlackDetector(),
    square_oauth.SquareOAuthDetector(),
    stripe.StripeDetector(),
    private_key.PrivateKeyDetector(),
)
_KEY_FILE = re.compile(
    r"(?:.*_)?(?:secrets?|credentials?|passwords|api_?keys?|private_?keys?)|id_(?:rsa|dsa|ecdsa|ed25519)|local_settings",
    re.IGNORECASE,
)
_KEY_BODY = re.compile(r"PRIVATE KEY(?: BLOCK)?-----[\s\\nr\"'+]*[A-Za-z0-9+/=]{40}")
_KEY_REST = re.compile(r".*?(?:-----END[ A-Z0-9]*PRIVATE KEY(?: BLOCK)?-----|\Z)", re.DOTALL)
_TOKEN = re.compile(r"[\w+/=-]*")
"""What may belong to a credential after what a pattern knows of it."""


def is_key_file(name: str) -> bool:
    """Whether a file is named for what must not be shown: secrets.py, wifi-credentials.h, config.secret.js."""
    return any(_KEY_FILE.fullmatch(part.replace("-", "_")) for part in PurePath(name).name.split("."))


def secret(text: str) -> str:
    """The kind of a credential in a text, and its line; never the credential itself."""
    for kind, begin, _ in _found(text):
        return f"{kind} in line {text.count(chr(10), 0, begin) + 1}"
    return ""


def masked(value: Any) -> Any:
    """A JSON value with the kind of each credential in the place of it."""
    if isinstance(value, dict):
        return {masked(key): masked(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [masked(part) for part in value]
    if not isinstance(value, str):
        return value
    end, parts = 0, []
    for kind, begin, stop in sorted(_found(value), key=lambda found: found[1:]):
        if stop > end:
            parts.append(value[end : max(begin, end)])
            parts.append(f"<{kind}>" if begin >= end else "")
            end = stop
    return "".join([*parts, value[end:]])


def _found(text: str) -> Iterator[tuple[str, int, int]]:
    """(kind, begin, end) of each credential, the end after all that may belong to it."""
    for detector in _DETECTORS:
        for pattern in detector.denylist:
            for match in pattern.finditer(text):
                credential, (begin, end) = match[0], match.span()
                if "EXAMPLE" in credential.upper():  # as every provider's own documentation has it
                    continue
                if isinstance(detector, private_key.PrivateKeyDetector):
                    if not _KEY_BODY.match(text, max(0, text.find("PRIVATE KEY", match.start()))):
                        continue  # code that looks for keys names the header alone
                    begin = len(text[:begin].rstrip("-"))
                    if rest := _KEY_REST.match(text, end):
                        end = rest.end()
                if isinstance(detector, jwt.JwtTokenDetector) and not detector.is_formally_valid(credential):
                    continue
                if token := _TOKEN.match(text, end):
                    end = token.end()
                yield detector.secret_type, begin, end
