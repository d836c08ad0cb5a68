"""Find variables that are nearly a setting's name: typos, and the names that other tools use. Pure.

A misspelled setting keeps its default, and nothing fails until a wrong host does not answer. But most names in an
environment belong to other programs, so a name is near only within one edit a word of a setting or of an alias below.
"""

from collections.abc import Collection, Mapping

# Names of the same settings in boto3, django-storages, MinIO's and RabbitMQ's clients and other workers.
ALIASES: Mapping[str, str] = {
    alias: name
    for name, aliases in {
        "RABBITMQ_URL": "RABBITMQ_URI AMQP_URL AMQP_URI RABBIT_URL RMQ_URL CLOUDAMQP_URL RABBITMQ_BROKER_URL",
        "RABBITMQ_HOST": "RABBITMQ_HOSTNAME RABBITMQ_ADDRESS",
        "RABBITMQ_USER": "RABBITMQ_USERNAME RABBITMQ_LOGIN",
        "RABBITMQ_PASS": "RABBITMQ_PASSWORD RABBITMQ_PASSWD RABBITMQ_PWD",
        "RABBITMQ_VHOST": "RABBITMQ_VIRTUAL_HOST RABBITMQ_VIRTUALHOST",
        "RABBITMQ_QUEUE": "RABBITMQ_QUEUE_NAME",
        "AWS_ACCESS_KEY_ID": "AWS_ACCESS_KEY AWS_ACCESS_ID AWS_S3_ACCESS_KEY_ID S3_ACCESS_KEY S3_ACCESS_KEY_ID "
        "S3_KEY MINIO_ACCESS_KEY",
        "AWS_SECRET_ACCESS_KEY": "AWS_SECRET_KEY AWS_SECRET AWS_ACCESS_SECRET_KEY AWS_S3_SECRET_ACCESS_KEY "
        "S3_SECRET_KEY S3_SECRET_ACCESS_KEY S3_SECRET MINIO_SECRET_KEY",
        "AWS_STORAGE_BUCKET_NAME": "AWS_BUCKET AWS_BUCKET_NAME AWS_S3_BUCKET AWS_S3_BUCKET_NAME AWS_STORAGE_BUCKET "
        "S3_BUCKET S3_BUCKET_NAME MINIO_BUCKET MINIO_BUCKET_NAME",
        "AWS_RESULTS_BUCKET_NAME": "AWS_RESULTS_BUCKET AWS_RESULT_BUCKET_NAME S3_RESULTS_BUCKET RESULTS_BUCKET",
        "AWS_S3_REGION_NAME": "AWS_REGION AWS_REGION_NAME AWS_S3_REGION S3_REGION S3_REGION_NAME",
        "AWS_S3_ENDPOINT_URL": "AWS_ENDPOINT AWS_ENDPOINT_URL AWS_ENDPOINT_URL_S3 AWS_S3_ENDPOINT S3_ENDPOINT "
        "S3_ENDPOINT_URL S3_URL MINIO_ENDPOINT MINIO_URL",
        "BACKEND_API_URL": "BACKEND_URL BACKEND_BASE_URL BACKEND_API BACKEND_API_BASE_URL BACKEND_HOST "
        "WEBHOOK_BASE_URL",
        "INTERNAL_API_TOKEN": "INTERNAL_TOKEN INTERNAL_API_KEY BACKEND_TOKEN BACKEND_API_TOKEN WEBHOOK_TOKEN",
        "WEBHOOK_SIGNING_SECRET": "WEBHOOK_SECRET WEBHOOK_SIGNING_KEY",
        "MODEL_ID": "MODEL_NAME MODEL_PATH BASE_MODEL SD_MODEL SD_MODEL_ID HF_MODEL_ID",
        "VAE_ID": "VAE_NAME VAE_PATH SD_VAE",
        "INFERENCE_STEPS": "NUM_INFERENCE_STEPS",
        "GUIDANCE_SCALE": "CFG_SCALE",
        "GUIDANCE_RESCALE": "CFG_RESCALE",
        "MAX_CONCURRENT_GENERATIONS": "MAX_CONCURRENCY MAX_CONCURRENT_JOBS",
        "METRICS_PORT": "HEALTH_PORT",
        "LOG_LEVEL": "LOGGING_LEVEL",
        "LOG_FORMAT": "LOGGING_FORMAT",
    }.items()
    for alias in aliases.split()
}
PREFIXES = {"RABBIT_": "RABBITMQ_", "RMQ_": "RABBITMQ_", "AMQP_": "RABBITMQ_", "DARKROOM_": ""}
# The URL overrides the single variables.
WHOLE_URL = "RABBITMQ_URL"
PARTS_OF_URL = frozenset(f"RABBITMQ_{part}" for part in ("HOST", "PORT", "USER", "PASS", "VHOST"))

# In a short word one edit makes another word: HOST and HOME, PASS and BASE.
MIN_TYPO_CHARS = 4
MAX_TYPOS = 2


def near_names(given: Collection[str], known: Collection[str]) -> dict[str, str]:
    """Map each unknown name of `given` to the setting of `known` that it is near to, unless that is given too.

    Two settings at the same distance are both named.
    """
    upper = {name.upper() for name in given}
    moot = upper | (PARTS_OF_URL if WHOLE_URL in upper else set())
    missing = [name for name in known if name not in moot]
    found = {name: _nearest(name.upper(), missing) for name in sorted(given) if name.upper() not in known}
    return {name: meant for name, meant in found.items() if meant}


def _nearest(name: str, missing: Collection[str]) -> str:
    spellings = [name, *(ours + name.removeprefix(one) for one, ours in PREFIXES.items() if name.startswith(one))]
    for spelling in spellings:
        if spelling in missing:
            return spelling
        if ALIASES.get(spelling) in missing:
            return ALIASES[spelling]
    written = dict(zip(missing, missing, strict=True)) | {
        alias: one for alias, one in ALIASES.items() if one in missing
    }
    typos = {one: count for one in written if (count := _num_typos(name, one)) is not None}
    return " or ".join(sorted({written[one] for one, count in typos.items() if count == min(typos.values())}))


def _num_typos(name: str, meant: str) -> int | None:
    """Count the words in which `name` is one edit from `meant`; None where it differs by more.

    An underscore too many or too few counts as none.
    """
    if name.replace("_", "") == meant.replace("_", ""):
        return 0
    words = list(zip(name.split("_"), meant.split("_"), strict=False))
    if name.count("_") != meant.count("_") or name[0] != meant[0]:
        return None
    wrong = [(one, other) for one, other in words if one != other]
    is_near = all(max(len(one), len(other)) >= MIN_TYPO_CHARS and _is_one_edit(one, other) for one, other in wrong)
    return len(wrong) if is_near and len(wrong) <= MAX_TYPOS else None


def _is_one_edit(one: str, other: str) -> bool:
    """Return whether the Damerau-Levenshtein distance is 1: an insertion, deletion, substitution or transposition."""
    if len(one) > len(other):
        one, other = other, one
    start = next((index for index, pair in enumerate(zip(one, other, strict=False)) if pair[0] != pair[1]), len(one))
    if len(one) < len(other):
        return one[start:] == other[start + 1 :]
    is_swap = one[start : start + 2] == other[start : start + 2][::-1]
    return one[start + 1 :] == other[start + 1 :] or (is_swap and one[start + 2 :] == other[start + 2 :])
