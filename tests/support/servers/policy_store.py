"""A real store whose keys may do what policies in AWS's language say."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from examples.parts.seaweedfs import SeaweedFS
from tests.support.paths import ROOT

SECRET = "policy-secret"


def documented_policy() -> dict[str, Any]:
    """Return the policy in docs/bucket-rights.md, for the buckets media, pictures and styles."""
    text = (ROOT / "docs" / "bucket-rights.md").read_text()
    policy: dict[str, Any] = json.loads(text.partition("```json\n")[2].partition("```")[0])
    return policy


class PolicyStore(SeaweedFS):
    """With one identity for each policy, by whose name its access key goes, beside the one that may do everything."""

    def __init__(self, folder: Path, policies: Mapping[str, Mapping[str, Any]]) -> None:
        super().__init__(folder)
        self._policies = policies

    def env_of(self, name: str) -> dict[str, str]:
        """Return the variables of a worker with that policy and the documented buckets."""
        return self.env("media") | {
            "AWS_ACCESS_KEY_ID": name,
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_RESULTS_BUCKET_NAME": "pictures",
            "ALLOWED_BUCKETS": "media,pictures,styles",
        }

    def make_buckets(self) -> None:
        for name in ("media", "pictures", "styles"):
            self.make_bucket(name)

    def _command(self) -> list[str]:
        everything = _identity(self.access_key_id, self.secret_access_key, actions=["Admin", "Read", "Write", "List"])
        config = {
            "identities": [everything, *(_identity(name, SECRET, policyNames=[name]) for name in self._policies)],
            "policies": [{"name": name, "content": json.dumps(policy)} for name, policy in self._policies.items()],
        }
        file = self.folder / "identities.json"
        file.write_text(json.dumps(config))
        return [*super()._command(), f"-s3.config={file}"]


def _identity(key: str, secret: str, **rights: list[str]) -> dict[str, Any]:
    return {"name": key, "credentials": [{"accessKey": key, "secretKey": secret}], **rights}
