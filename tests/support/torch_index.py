"""`python tests/support/torch_index.py URL`: print pip's option for an index of torch's own, if that index answers.

`make` asks before anything is installed, so it runs on the standard library alone. pip would try an index that cannot
be reached five times for each package, each time for as long as its timeout.
"""

import ssl
import sys
import urllib.request
from urllib.error import HTTPError, URLError

PROBE_SECONDS = 5.0


def option_for(url: str, probe_seconds: float = PROBE_SECONDS) -> str:
    """Return `--extra-index-url=…`; empty where no index is named or the one named does not answer."""
    if not url:
        return ""
    reason = "" if not url.startswith(("http://", "https://")) else _why_unusable(url, probe_seconds)
    if not reason:
        return f"--extra-index-url={url}"
    print(
        f"{url} cannot be used ({reason}): torch comes from where pip looks anyway, on most machines with CUDA, which"
        " is gigabytes more. TORCH_INDEX_URL names another index of its CPU wheels.",
        file=sys.stderr,
    )
    return ""


def _why_unusable(url: str, probe_seconds: float) -> str:
    try:
        urllib.request.urlopen(f"{url.rstrip('/')}/torch/", timeout=probe_seconds).close()
    except HTTPError as error:
        return f"it answers {error.code}"
    except URLError as error:
        # pip brings certificates of its own.
        return "" if isinstance(error.reason, ssl.SSLCertVerificationError) else str(error.reason)
    except OSError as error:
        return str(error)
    return ""


if __name__ == "__main__":
    print(option_for(sys.argv[1]))
