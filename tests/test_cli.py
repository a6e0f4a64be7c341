import pytest
from test_job import arguments

from spark_nsfw.cli import main


def test_score_prints_the_summary(spark, shards, tmp_path, detector_path, capsys):
    status = main(["score", *arguments(shards / "00000.tar", tmp_path / "out", detector_path),
                   "--plan=fused", "--captions", "--columns=", "--no-embeddings"])  # fmt: skip
    assert status == 0
    assert "11 samples in 1 shards, 0 rows failed" in capsys.readouterr().out
    assert spark.read.parquet(str(tmp_path / "out")).columns == [
        "key", "caption", "status", "error_message", "nsfw_score", "shard",
    ]  # fmt: skip


def test_bad_input_is_exit_status_2_and_one_line(spark, tmp_path, detector_path, capsys):
    assert main(["score", *arguments(tmp_path / "none", tmp_path / "out", detector_path)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "no shard (*.tar)" in error


def test_weights_that_cannot_be_had_are_exit_status_1(spark, shards, tmp_path, capsys):
    bad = arguments(shards, tmp_path / "out", "/nowhere/detector.zip")
    assert main(["score", *bad]) == 1
    assert "/nowhere/detector.zip" in capsys.readouterr().err


@pytest.mark.parametrize("argument", ["--plan=magic", "--precision=float8", "--nope"])
def test_unknown_arguments_are_exit_status_2(argument):
    with pytest.raises(SystemExit) as exit_:
        main(["score", "in", "out", argument])
    assert exit_.value.code == 2


def test_help_lists_every_option(capsys):
    with pytest.raises(SystemExit):
        main(["score", "--help"])
    text = capsys.readouterr().out
    for option in ["--clip-checkpoint", "--nsfw-checkpoint", "--no-pretrained", "--batch-size",
                   "--num-threads", "--precision", "--device", "--columns", "--no-embeddings",
                   "--shards-per-wave"]:  # fmt: skip
        assert option in text
