"""Object stores behind a URI: what is made of it, and what is said of one that makes no sense or does not answer."""

import pickle

import pytest

from hone.data.files import find_files
from hone.errors import DataError, ResourceError
from hone.folder import Folder
from hone.object_store import open_store, split_query
from hone.ports import free_port
from tests.s3 import Store


@pytest.mark.parametrize(
    ("uri", "plain", "query"),
    [
        ("s3://b/x?endpoint_override=h:1&scheme=http", "s3://b/x", "endpoint_override=h:1&scheme=http"),
        ("s3://b/part-?.jsonl", "s3://b/part-?.jsonl", ""),
        ("s3://b/part-?.jsonl?region=eu", "s3://b/part-?.jsonl", "region=eu"),
        ("/data/a?b=c", "/data/a?b=c", ""),
    ],
)
def test_a_question_mark_is_a_wildcard_unless_a_key_follows_it(uri: str, plain: str, query: str) -> None:
    assert split_query(uri) == (plain, query)


@pytest.mark.parametrize(
    ("uri", "said"),
    [
        ("s3://key:secret@bucket/x", r"^s3://bucket/x: cannot be opened \(it holds a key.*AWS_ACCESS_KEY_ID"),
        ("s3://bucket/x?endpoint=h", r"^s3://bucket/x: cannot be opened \(unknown option endpoint; there are .*endpoint_override"),
        ("s3:///x", r"^s3:///x: cannot be opened \(it names no bucket\)"),
    ],
)
def test_a_uri_that_makes_no_sense_is_refused_without_its_secrets(uri: str, said: str) -> None:
    with pytest.raises(ResourceError, match=said) as caught:
        Folder(uri)
    assert "secret@" not in caught.value.message


def test_a_store_that_is_not_there_is_given_up_soon_and_said_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{free_port()}")
    with pytest.raises(ResourceError, match=r"^checkpoints.uri s3://bucket/x: cannot be written \(.*NETWORK_CONNECTION.*; check bucket"):
        Folder("s3://bucket/x").check_writable("checkpoints.uri")
    with pytest.raises(DataError, match=r"^s3://bucket/x.jsonl: cannot be read \(.*NETWORK_CONNECTION.*; check bucket"):
        find_files("s3://bucket/x.jsonl")


def test_google_s_store_is_not_tried_for_a_quarter_of_an_hour() -> None:
    store, path = open_store("gs://anonymous@bucket/x?scheme=http&endpoint_override=127.0.0.1:1")
    assert path == "bucket/x"
    assert store.__reduce__()[1][0]["retry_time_limit"].total_seconds() == 60


def test_a_bucket_that_is_not_there_is_named(store: Store) -> None:
    with pytest.raises(ResourceError, match=r"^checkpoints.uri s3://nowhere/x: cannot be written \(.*'nowhere' not found"):
        Folder(store.uri("nowhere/x")).check_writable("checkpoints.uri")


def test_the_endpoint_may_be_in_the_environment(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    bucket = store.new_bucket()
    Folder(store.uri(f"{bucket}/a")).write("x", b"hello")
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{store.port}/")
    folder = Folder(f"s3://{bucket}/a/")
    assert (folder.read("x"), str(folder.below("b"))) == (b"hello", f"s3://{bucket}/a/b")
    folder.check_writable("checkpoints.uri")
    assert (folder.size("x"), folder.folders(), Folder(f"s3://{bucket}").folders()) == (5, [], ["a"])


def test_rows_are_found_by_name_folder_and_wildcard_and_their_file_system_travels(store: Store) -> None:
    bucket = store.new_bucket()
    for name in ("part-1.jsonl", "part-2.jsonl", "other.csv"):
        Folder(store.uri(f"{bucket}/data")).write(name, b"a\n")
    names = {
        path: [file.name for file in find_files(store.uri(f"{bucket}/{path}"))]
        for path in ("data/part-1.jsonl", "data", "data/part-?.jsonl")
    }
    both = [f"s3://{bucket}/data/part-{n}.jsonl" for n in (1, 2)]
    assert list(names.values()) == [both[:1], [f"s3://{bucket}/data/other.csv", *both], both]
    [file] = find_files(store.uri(f"{bucket}/data/other.csv"))
    with pickle.loads(pickle.dumps(file)).filesystem.open_input_stream(file.path) as stream:
        assert stream.read() == b"a\n"
