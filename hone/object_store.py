"""Object stores behind a URI: where they are, as whom, and for how long one that does not answer is tried.

`s3://bucket/path?endpoint_override=host:9000&scheme=http` names a store that is not Amazon's; AWS_ENDPOINT_URL does so for all URIs. Keys
come from where the AWS SDK looks for them (AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, ~/.aws, the machine's role) and for `gs://` from
where Google's does (GOOGLE_APPLICATION_CREDENTIALS), on every node.
"""

import os
import re
from typing import Any
from urllib.parse import parse_qsl, unquote, urlsplit

ATTEMPTS = 3
"""Of a request to S3. Arrow's own, with a URI, are eleven, a second and more apart."""
CONNECT_S = 5.0
SILENT_S = 10.0
"""After so long without a byte a request is begun again."""
GCS_LIMIT_S = 60
"""Arrow's own is a quarter of an hour."""
WORDS = ("region", "scheme", "endpoint_override")
FLAGS = ("anonymous", "force_virtual_addressing")
QUERY = re.compile(r"\?(?=\w+=)")


def split_query(uri: str) -> tuple[str, str]:
    """A URI and what stands behind its question mark; one that no `key=` follows is a wildcard, and stays."""
    found = QUERY.search(uri) if "://" in uri else None
    return (uri[: found.start()], uri[found.end() :]) if found else (uri, "")


def open_store(uri: str) -> tuple[Any, str]:
    """The `pyarrow.fs.FileSystem` of a URI with a scheme, and the path in it.

    Raises:
        ValueError: a URI that makes no sense. OSError: a store that does not say where the bucket is.
    """
    from pyarrow.fs import FileSystem

    scheme = uri.partition("://")[0]
    if scheme == "s3":
        return _s3(uri)
    if scheme in ("gs", "gcs") and "retry_limit_seconds=" not in uri:
        uri += f"{'&' if split_query(uri)[1] else '?'}retry_limit_seconds={GCS_LIMIT_S}"
    made: tuple[Any, str] = FileSystem.from_uri(uri)
    return made


def _s3(uri: str) -> tuple[Any, str]:
    from pyarrow.fs import AwsStandardS3RetryStrategy, S3FileSystem, resolve_s3_region

    plain, query = split_query(uri)
    parts = urlsplit(plain)
    if "@" in parts.netloc:
        raise ValueError("it holds a key, which the run folder would keep; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY instead")
    if not parts.netloc:
        raise ValueError("it names no bucket")
    options = {**_endpoint(), **_options(query)}
    if "region" not in options and not any(name in os.environ for name in ("AWS_REGION", "AWS_DEFAULT_REGION")):
        options["region"] = "us-east-1" if "endpoint_override" in options else resolve_s3_region(parts.netloc)
    store = S3FileSystem(
        **options,
        connect_timeout=CONNECT_S,
        request_timeout=SILENT_S,
        retry_strategy=AwsStandardS3RetryStrategy(max_attempts=ATTEMPTS),
    )
    return store, unquote(f"{parts.netloc}{parts.path}").rstrip("/")


def _endpoint() -> dict[str, str]:
    """What the environment says of it: Arrow looks there for a URI, but not where it is given options."""
    url = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    if not url:
        return {}
    scheme, _, host = url.rpartition("://")
    return {"scheme": scheme or "https", "endpoint_override": host.rstrip("/")}


def _options(query: str) -> dict[str, Any]:
    options: dict[str, Any] = {}
    for key, value in parse_qsl(query):
        if key not in (*WORDS, *FLAGS):
            raise ValueError(f"unknown option {key}; there are {', '.join((*WORDS, *FLAGS))}")
        options[key] = value if key in WORDS else value.lower() in ("1", "true")
    return options
