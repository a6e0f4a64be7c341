import json
import pickle

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from examples.photographs import write_shard
from spark_nsfw import SampleOptions, iter_sample_batches
from spark_nsfw.errors import InputError, ShardUnreadableError
from spark_nsfw.read.columns import infer_from_first, infer_passthrough
from spark_nsfw.read.paths import ShardInputs
from spark_nsfw.read.shards import IMAGE_EXTENSIONS, ShardSource


def rows(path, **options):
    if "passthrough" not in options:
        id_col, captions = options.get("id_col", "key"), options.get("captions", False)
        fields = infer_passthrough(str(path), id_col, captions=captions)
        options["passthrough"] = tuple(fields)
    batches = iter_sample_batches([(str(path), "s")], SampleOptions(**options))
    return pa.Table.from_batches(batches).to_pylist()


def described(*objects):
    return [
        (f"{i}", [("jpg", b"x"), ("json", json.dumps(about).encode())])
        for i, about in enumerate(objects)
    ]


def test_json_keys_become_typed_columns(tmp_path):
    path = tmp_path / "s.tar"
    about = {"key": "0", "url": "u", "width": 3, "ratio": 0.5, "ok": True, "tags": ["a"]}
    write_shard(path, described(about))
    (row,) = rows(path)
    assert (row["url"], row["width"], row["ratio"], row["ok"]) == ("u", 3, 0.5, True)
    assert json.loads(row["tags"]) == ["a"]
    assert row["extra_json"] is None


def test_what_does_not_fit_its_column_is_kept_in_extra_json(tmp_path):
    path = tmp_path / "s.tar"
    write_shard(path, described(*[{"width": 1}] * 100, {"width": "wide", "new": {"a": 1}}))
    last = rows(path)[-1]
    assert last["width"] is None
    assert json.loads(last["extra_json"]) == {"width": "wide", "new": {"a": 1}}


@pytest.mark.parametrize(
    ("first", "later"),
    [(0, 0.97), (0.5, True), (1, True), (True, 1), (1, "1"), (0.5, 2**53 + 1), (1, 2**63)],
)
def test_no_value_is_bent_to_fit(tmp_path, first, later):
    write_shard(tmp_path / "s.tar", described(*[{"v": first}] * 100, {"v": later}))
    last = rows(tmp_path / "s.tar")[-1]
    assert last["v"] is None
    assert json.loads(last["extra_json"]) == {"v": later}


def test_whole_numbers_go_into_a_column_of_floats(tmp_path):
    write_shard(tmp_path / "s.tar", described({"v": 0.5}, {"v": 2}))
    assert [(row["v"], row["extra_json"]) for row in rows(tmp_path / "s.tar")] == [
        (0.5, None),
        (2.0, None),
    ]


def test_half_an_emoji_costs_nothing_but_itself(tmp_path):
    halves = [rb'{"c": "smile \ud83d"}', b'{"c": "smile \xed\xa0\xbd"}', rb'{"c": "\ud83d\ude00"}']
    write_shard(
        tmp_path / "s.tar", [(f"{i}", [("jpg", b"x"), ("json", j)]) for i, j in enumerate(halves)]
    )
    assert [row["c"] for row in rows(tmp_path / "s.tar")] == ["smile \ufffd"] * 2 + ["\U0001f600"]


def test_json_too_deep_to_read_is_kept_and_told(tmp_path):
    deep = b"[" * 100_000
    write_shard(tmp_path / "s.tar", [*described({"a": 1}), ("x", [("jpg", b"x"), ("json", deep)])])
    row = rows(tmp_path / "s.tar")[1]
    assert "cannot be used" in row["error_message"]
    assert json.loads(row["extra_json"]) == deep.decode()


def test_a_caption_of_the_datasets_own_gives_way_to_the_captions(tmp_path):
    members = [("jpg", b"x"), ("txt", b"ours"), ("json", b'{"caption": "theirs"}')]
    write_shard(tmp_path / "s.tar", [("0", members)])
    (row,) = rows(tmp_path / "s.tar", captions=True)
    assert (row["caption"], row["source_caption"]) == ("ours", "theirs")
    (row,) = rows(tmp_path / "s.tar")
    assert row["caption"] == "theirs"


def test_names_that_differ_in_case_only_are_one_column(tmp_path):
    write_shard(tmp_path / "s.tar", described({"url": "a", "URL": "b", "Status": "c"}))
    (row,) = rows(tmp_path / "s.tar")
    assert (row["url"], row["source_Status"]) == ("a", "c")
    assert "URL" not in row
    assert json.loads(row["extra_json"]) == {"URL": "b"}


def test_a_shard_without_columns_does_not_settle_them(tmp_path):
    (tmp_path / "a.tar").write_bytes(b"")
    write_shard(tmp_path / "b.tar", described({"width": 1}))
    (tmp_path / "b.parquet").write_bytes(b"no Parquet")
    write_shard(tmp_path / "c.tar", described({"width": 1}))
    paths = [str(tmp_path / f"{name}.tar") for name in "abc"]
    assert [f.name for f in infer_from_first(paths, "key")] == ["width", "extra_json"]
    assert infer_from_first(paths[:2], "key") == []
    with pytest.raises(ShardUnreadableError, match=r"b\.parquet"):
        infer_from_first(paths[1:2], "key")


def test_json_that_is_none_is_kept_and_told(tmp_path):
    path = tmp_path / "s.tar"
    write_shard(path, [*described({"a": 1}), ("x", [("jpg", b"x"), ("json", b"{oops")])])
    row = rows(path)[1]
    assert row["status"] == "ok"
    assert "cannot be used" in row["error_message"]
    assert json.loads(row["extra_json"]) == "{oops"


def test_names_of_the_contract_get_a_prefix(tmp_path):
    path = tmp_path / "s.tar"
    write_shard(path, described({"status": "success", "shard": 7}))
    (row,) = rows(path)
    assert (row["status"], row["source_status"], row["source_shard"]) == ("ok", "success", 7)


def test_sidecar_rows_are_matched_by_id_not_by_order(tmp_path):
    path = tmp_path / "s.tar"
    write_shard(path, [(key, [("jpg", b"x")]) for key in "abc"])
    sidecar = pd.DataFrame({"key": ["c", "z", "a"], "url": ["uc", "uz", "ua"], "n": [3, 9, 1]})
    sidecar.to_parquet(tmp_path / "s.parquet")
    assert [(r["key"], r["url"], r["n"]) for r in rows(path)] == [
        ("a", "ua", 1),
        ("b", None, None),
        ("c", "uc", 3),
    ]


def test_integer_ids_match_keys_with_leading_zeros(tmp_path):
    path = tmp_path / "s.tar"
    write_shard(path, [("000041", [("jpg", b"x")])])
    pd.DataFrame({"id": [41], "url": ["u"]}).to_parquet(tmp_path / "s.parquet")
    (row,) = rows(path, id_col="id")
    assert (row["id"], row["url"]) == (41, "u")


def test_the_id_in_the_json_finds_the_sidecar_row(tmp_path):
    path = tmp_path / "s.tar"
    write_shard(path, described({"uid": "q"}))
    pd.DataFrame({"uid": ["q"], "url": ["u"]}).to_parquet(tmp_path / "s.parquet")
    (row,) = rows(path, id_col="uid")
    assert (row["key"], row["uid"], row["url"]) == ("0", "q", "u")


def test_the_sidecar_wins_over_the_json(tmp_path):
    path = tmp_path / "s.tar"
    write_shard(path, described({"key": "0", "url": "json", "more": 1}))
    pd.DataFrame({"key": ["0"], "url": ["sidecar"]}).to_parquet(tmp_path / "s.parquet")
    (row,) = rows(path)
    assert (row["url"], row["more"]) == ("sidecar", 1)


def test_columns_that_only_a_later_sidecar_has_are_kept(tmp_path):
    write_shard(tmp_path / "a.tar", [("0", [("jpg", b"x")])])
    pd.DataFrame({"key": ["0"], "n": [1]}).to_parquet(tmp_path / "a.parquet")
    write_shard(tmp_path / "b.tar", [("0", [("jpg", b"x")])])
    pd.DataFrame({"key": ["0"], "n": ["many"], "m": [2]}).to_parquet(tmp_path / "b.parquet")
    fields = tuple(infer_passthrough(str(tmp_path / "a.tar"), "key"))
    (row,) = rows(tmp_path / "b.tar", passthrough=fields)
    assert row["n"] is None
    assert json.loads(row["extra_json"]) == {"n": "many", "m": 2}


@pytest.mark.parametrize(
    ("array", "expected"),
    [
        (pa.array([1], pa.uint8()), 1),
        (pa.array([2**63], pa.uint64()), 2**63),
        (pa.array(["x"]).dictionary_encode(), "x"),
        (pa.array([None], pa.null()), None),
        (pa.array([[1, 2]], pa.large_list(pa.uint16())), [1, 2]),
        (pa.array([{"a": 1}], pa.struct([("a", pa.uint32())])), {"a": 1}),
        (pa.array([0.5], pa.float16()), 0.5),
    ],
)
def test_types_that_spark_lacks_widen(tmp_path, array, expected):
    write_shard(tmp_path / "s.tar", [("0", [("jpg", b"x")])])
    table = pa.table({"key": ["0"], "value": array})
    pq.write_table(table, tmp_path / "s.parquet")
    (row,) = rows(tmp_path / "s.tar")
    assert row["value"] == expected


def test_a_column_that_is_named_like_our_note_does_not_make_a_sidecar_ours(tmp_path):
    write_shard(tmp_path / "s.tar", described({"uid": "q"}))
    sidecar = pd.DataFrame(
        {"uid": ["q"], "key": ["theirs"], "status": ["success"], "spark_nsfw_old": [0.5]}
    )
    sidecar.to_parquet(tmp_path / "s.parquet")  # the footer names every column
    assert b"spark_nsfw" in b"".join(pq.read_schema(tmp_path / "s.parquet").metadata.values())
    (row,) = rows(tmp_path / "s.tar", id_col="uid")
    assert (row["key"], row["status"]) == ("0", "ok")
    assert (row["source_key"], row["source_status"]) == ("theirs", "success")
    assert (row["uid"], row["spark_nsfw_old"]) == ("q", 0.5)


def test_a_damaged_sidecar_costs_no_sample_and_says_so(tmp_path):
    write_shard(tmp_path / "s.tar", described({"a": 1}))
    fields = tuple(infer_passthrough(str(tmp_path / "s.tar"), "key"))
    (tmp_path / "s.parquet").write_bytes(b"PAR1 not really")
    sample, fault = rows(tmp_path / "s.tar", passthrough=fields)
    assert (sample["status"], sample["a"]) == ("ok", 1)
    assert (fault["key"], fault["status"]) == (None, "sidecar_unreadable")


@pytest.mark.parametrize(
    "table",
    [
        pa.table([pa.array(["0"]), pa.array([1]), pa.array([2])], names=["key", "a", "a"]),
        pa.table({"key": pa.array([b"\xff\xfe"]).view(pa.string())}),
        pa.table({"a": [1]}),
    ],
    ids=["two columns of one name", "keys that are no text", "no keys"],
)
def test_a_sidecar_that_nothing_can_be_matched_by_costs_no_sample(tmp_path, table):
    write_shard(tmp_path / "s.tar", described({"a": 1}))
    fields = tuple(infer_passthrough(str(tmp_path / "s.tar"), "key"))
    pq.write_table(table, tmp_path / "s.parquet")
    sample, fault = rows(tmp_path / "s.tar", passthrough=fields)
    assert (sample["status"], sample["a"]) == ("ok", 1)
    assert (fault["key"], fault["status"]) == (None, "sidecar_unreadable")
    assert "s.parquet: " in fault["error_message"]


def test_a_source_settles_columns_in_the_first_shard_that_has_any(tmp_path):
    (tmp_path / "a.tar").write_bytes(b"")
    write_shard(tmp_path / "b.tar", described({"width": 1, "url": "u"}))
    write_shard(tmp_path / "c.tar", described({"height": 1}))
    inputs = ShardInputs.parse(tmp_path)
    ours = ["shard", "key", "status", "error_message"]
    places = ["image_offset", "image_num_bytes"]
    for columns, own in [(None, ["width", "url", "extra_json"]), ((), []), (["url"], ["url"])]:
        names = ShardSource(inputs, columns=columns).schema().names
        assert names == [*ours[:2], *own, *places, *ours[2:]]
    captions = ShardSource(inputs, SampleOptions(captions=True), ()).schema().names
    assert captions == ["shard", "key", "caption", *places, "status", "error_message"]
    with pytest.raises(InputError, match="no column depth"):
        ShardSource(inputs, columns=["depth"]).schema()
    settled = ShardSource(inputs).schema([pa.field("old", pa.int64())])
    assert settled.names == [*ours[:2], "old", *ours[2:]]


def test_a_source_reads_a_unit_into_the_columns_of_a_schema(tmp_path):
    write_shard(tmp_path / "a" / "0.tar", described({"width": 1, "url": "u"}))
    source = pickle.loads(pickle.dumps(ShardSource(ShardInputs.parse(tmp_path))))
    (unit,) = source.units()
    schema = source.schema([pa.field("url", pa.string()), pa.field("gone", pa.int64())])
    ((batch, images),) = source.read(unit, schema)
    assert batch.schema == schema
    row = {"shard": "a/0", "key": "0", "url": "u", "gone": None}
    assert batch.to_pylist() == [row | {"status": "ok", "error_message": None}]
    assert images == [b"x"]


def test_sidecars_that_cannot_be_used_are_refused_at_the_start(tmp_path):
    write_shard(tmp_path / "s.tar", described({"a": 1}))
    pd.DataFrame({"uid": ["0"]}).to_parquet(tmp_path / "s.parquet")
    source = ShardSource(ShardInputs.parse(tmp_path))
    with pytest.raises(InputError, match=r"s\.parquet: the sidecar has no column 'key'"):
        source.schema()
    assert ShardSource(source.inputs, SampleOptions(id_col="uid")).schema().names[2] == "uid"


def test_a_shard_that_is_gone_has_no_row_whatever_its_sidecar(tmp_path):
    write_shard(tmp_path / "s.tar", described({"a": 1}))
    source = ShardSource(ShardInputs.parse(tmp_path))
    (unit,), schema = source.units(), source.schema()
    (tmp_path / "s.tar").unlink()
    for sidecar in (None, b"PAR1 no"):
        if sidecar:
            (tmp_path / "s.parquet").write_bytes(sidecar)
        with pytest.raises(FileNotFoundError):
            next(source.read(unit, schema))


def test_what_a_source_says_of_itself_is_what_version_0_1_0_noted(tmp_path):
    source = ShardSource(ShardInputs.parse("s3a://b/in"), SampleOptions(id_col="uid"), ["url"])
    assert source.describe() == {
        "inputs": {"kind": "webdataset", "filesystem": "s3a://b", "roots": ["/in/"]},
        "rows": {
            "columns": ["url"],
            "captions": False,
            "id_col": "uid",
            "image_extensions": [*IMAGE_EXTENSIONS],
            "max_image_bytes": 64 << 20,
        },
    }


def test_a_sidecar_without_the_id_column_is_refused_at_the_start(tmp_path):
    write_shard(tmp_path / "s.tar", described({"a": 1}))
    pd.DataFrame({"uid": ["0"]}).to_parquet(tmp_path / "s.parquet")
    with pytest.raises(ShardUnreadableError, match="no column 'key'"):
        infer_passthrough(str(tmp_path / "s.tar"), "key")


def test_only_wanted_columns_are_kept_and_unknown_ones_refused(tmp_path):
    write_shard(tmp_path / "s.tar", described({"a": 1, "b": 2}))
    assert [f.name for f in infer_passthrough(str(tmp_path / "s.tar"), "key", ["b"])] == ["b"]
    with pytest.raises(InputError, match="no column c"):
        infer_passthrough(str(tmp_path / "s.tar"), "key", ["c"])


def test_the_preferred_image_wins_and_a_missing_one_is_told(tmp_path):
    path = tmp_path / "s.tar"
    write_shard(
        path,
        [("both", [("png", b"p"), ("jpg", b"j")]), ("odd", [("v2.jpg", b"x"), ("txt", b"t")])],
    )
    both, odd = rows(path)
    assert both["image"] == b"j"
    assert (odd["status"], odd["image"]) == ("image_missing", None)
    assert "v2.jpg, txt" in odd["error_message"]
    assert [r["image"] for r in rows(path, image_extensions=(".V2.jpg", "png"))] == [b"p", b"x"]


def test_captions_are_kept_when_asked(tmp_path):
    path = tmp_path / "s.tar"
    write_shard(path, [("a", [("jpg", b"x"), ("txt", "größer".encode())])])
    assert rows(path, captions=True)[0]["caption"] == "größer"
    assert "caption" not in rows(path)[0]


def test_batches_are_bounded_in_rows_and_bytes(tmp_path):
    path = tmp_path / "s.tar"
    write_shard(path, [(f"{i:03}", [("jpg", b"x" * 1000)]) for i in range(50)])

    def sizes(**options):
        options = SampleOptions(**options)
        return [b.num_rows for b in iter_sample_batches([(str(path), "s")], options)]

    assert sizes(batch_rows=20) == [20, 20, 10]
    assert sizes(batch_bytes=10_000) == [10] * 5
