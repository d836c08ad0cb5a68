"""Errors of the store, and the translation of boto3's and urllib3's errors into them.

Messages hold the location, the store's error code and the status: never a header, a URL or a credential.
"""

import socket
import ssl
from collections.abc import Iterator
from contextlib import contextmanager

import urllib3.exceptions
from botocore import exceptions as boto
from botocore.parsers import ResponseParserError

from clients.deadline import DeadlineExpired

# Codes that the status does not imply: AWS answers 400 to expired tokens and to a slow request body.
ACCESS_CODES = frozenset(
    {
        "AccessDenied",
        "AccountProblem",
        "AllAccessDisabled",
        "AuthorizationHeaderMalformed",
        "ExpiredToken",
        "ExpiredTokenException",
        "InvalidAccessKeyId",
        "InvalidClientTokenId",
        "InvalidSecurity",
        "InvalidToken",
        "KMS.DisabledException",
        "KMS.KMSInvalidStateException",
        "KMS.NotFoundException",
        "MalformedSecurityHeader",
        "MissingSecurityHeader",
        "NotSignedUp",
        "QuotaExceeded",
        "RequestExpired",
        "RequestTimeTooSkewed",
        "SignatureDoesNotMatch",
        "TokenRefreshRequired",
        "UnauthorizedAccess",
        "UnrecognizedClientException",
        "UserProjectAccountProblem",
        "XMinioAdminBucketQuotaExceeded",
    }
)
# The bucket is not at this endpoint and in this region, for any request.
BUCKET_CODES = frozenset(
    {
        "IllegalLocationConstraintException",
        "IncorrectEndpoint",
        "InvalidBucketName",
        "InvalidRegion",
        "NoSuchBucket",
        "PermanentRedirect",
        "Redirect",
        "TemporaryRedirect",
    }
)
# Also requests that arrived damaged at the store.
UNAVAILABLE_CODES = frozenset(
    {
        "BadDigest",
        "IncompleteBody",
        "RequestLimitExceeded",
        "RequestTimeout",
        "SlowDown",
        "Throttling",
        "XAmzContentChecksumMismatch",
        "XAmzContentSHA256Mismatch",
        "XMinioStorageFull",
    }
)
# Without 501: an operation that is not implemented will not work later.
UNAVAILABLE_STATUSES = frozenset({408, 425, 429, 500, 502, 503, 504, 507})


class StorageError(Exception):
    """The store refused or failed in a way that none of the classes below names."""


class ObjectNotFound(StorageError):
    """There is no object under this key."""


class StoreRefused(StorageError):
    """The store as configured refuses requests of every job: no fault of the job, and a retry fails until an operator
    fixes the configuration or the store."""


class BucketNotFound(StoreRefused):
    """The bucket does not exist at this endpoint and region."""


class AccessDenied(StoreRefused):
    """The store refuses the worker's credentials, clock or permissions."""


class NotAStore(StoreRefused):
    """The server at the endpoint is no object store, or its certificate is not accepted."""


class StorageUnavailable(StorageError):
    """The store cannot be reached, is too slow or too busy; a retry may succeed."""


class NotSupported(StorageError):
    """The store does not implement this request."""


class WriteConflict(StorageUnavailable):
    """Two conditional writes of one key collided, and the store committed neither."""


class ObjectTooLarge(StorageError):
    """The object is larger than the caller allows."""


class ObjectDamaged(StorageError):
    """The body that arrived is cut short or has another checksum than the store states."""


class ObjectChanged(ObjectDamaged):
    """The object is not the expected version: a condition (`If-Match`, `If-None-Match`) failed."""


_CODE_CLASSES: dict[str, type[StorageError]] = {
    "NotImplemented": NotSupported,
    "NoSuchKey": ObjectNotFound,
    "ConditionalRequestConflict": WriteConflict,
    "OperationAborted": WriteConflict,
    **dict.fromkeys(ACCESS_CODES, AccessDenied),
    **dict.fromkeys(BUCKET_CODES, BucketNotFound),
    **dict.fromkeys(UNAVAILABLE_CODES, StorageUnavailable),
}
_STATUS_CLASSES: dict[int, type[StorageError]] = {
    # Redirects are not followed: the bucket is at another endpoint.
    **dict.fromkeys((301, 302, 303, 307, 308), BucketNotFound),
    401: AccessDenied,
    403: AccessDenied,
    404: ObjectNotFound,
    405: NotAStore,
    409: WriteConflict,
    412: ObjectChanged,
    501: NotSupported,
    **dict.fromkeys(UNAVAILABLE_STATUSES, StorageUnavailable),
}


@contextmanager
def translate_errors(subject: object) -> Iterator[None]:
    """Raise a `StorageError` about `subject` for every error of boto3 and urllib3 inside the block."""
    try:
        yield
    except boto.ClientError as error:
        code = str(error.response.get("Error", {}).get("Code", ""))
        status = int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
        # The response to a HEAD has no body: boto3 then gives the status as code, and only the status counts.
        found = _CODE_CLASSES.get(code) or _STATUS_CLASSES.get(status, StorageError)
        raise found(f"{subject}: the store answered {status} {code[:80]}".removesuffix(f" {status}")) from error
    except DeadlineExpired as error:
        raise StorageUnavailable(f"{subject}: {error}") from error
    except (boto.NoCredentialsError, boto.PartialCredentialsError, boto.CredentialRetrievalError) as error:
        raise AccessDenied(f"{subject}: no usable credentials ({type(error).__name__})") from error
    except ResponseParserError as error:
        raise NotAStore(f"{subject}: what answers is no S3 store: look at AWS_S3_ENDPOINT_URL") from error
    except (boto.HTTPClientError, boto.ConnectionError, urllib3.exceptions.HTTPError) as error:
        raise _connection_error(subject, error) from error
    except boto.BotoCoreError as error:
        raise StorageError(f"{subject}: {type(error).__name__}") from error


def _connection_error(subject: object, error: Exception) -> StorageError:
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, ssl.SSLCertVerificationError):
            return NotAStore(f"{subject}: the certificate at the store's address is not accepted ({cause.args[-1]})")
        # EAI_AGAIN, a name server that does not answer, is transient.
        if isinstance(cause, socket.gaierror) and cause.errno == socket.EAI_NONAME:
            return NotAStore(f"{subject}: the store's host name does not exist")
        cause = cause.__cause__ or cause.__context__
    return StorageUnavailable(f"{subject}: the store cannot be reached ({type(error).__name__})")
