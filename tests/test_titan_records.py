"""A run's metrics file survives restarts and interrupted writes."""

from titan_shampoo.titan.records import RunRecords


def test_a_resumed_run_drops_what_lies_after_the_step_it_resumes_from(tmp_path):
    records = RunRecords(tmp_path)
    records.resume(0)
    for step in (1, 5, 10, 15):
        records.append({"step": step, "loss": 1 / step})
    records.append({"step": 10, "validation_loss": 0.5})
    records.resume(10)
    records.append({"step": 12, "loss": 0.2})
    assert [record["step"] for record in records.read()] == [1, 5, 10, 10, 12]


def test_a_run_from_the_start_forgets_an_older_run_in_the_same_folder(tmp_path):
    records = RunRecords(tmp_path)
    records.resume(0)
    records.append({"step": 1, "loss": 2.0})
    records.resume(0)
    assert records.read() == []


def test_a_line_cut_short_by_a_kill_is_dropped(tmp_path):
    records = RunRecords(tmp_path)
    records.file.write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "lo')
    assert records.read() == [{"step": 1, "loss": 2.0}]
    records.resume(5)
    records.append({"step": 6, "loss": 1.0})
    assert [record["step"] for record in records.read()] == [1, 6]


def test_the_loss_plot_is_a_png_even_of_a_run_that_logged_nothing(tmp_path):
    records = RunRecords(tmp_path)
    records.resume(0)
    records.draw_loss("nothing")
    assert records.plot.read_bytes()[:4] == b"\x89PNG"


def test_a_folder_that_becomes_a_file_ends_no_run_and_is_said_once(tmp_path, caplog):
    records = RunRecords(tmp_path / "run")
    records.append({"step": 1, "loss": 1.0})
    records.file.unlink()
    records.file.parent.rmdir()
    records.file.parent.touch()
    records.append({"step": 2, "loss": 1.0})
    records.append({"step": 3, "loss": 1.0})
    records.draw_loss("")
    (record,) = caplog.records
    assert f"{tmp_path / 'run'}" in record.getMessage()
    assert "metrics cannot be written" in record.getMessage()
    records.file.parent.unlink()
    records.append({"step": 4, "loss": 1.0})
    assert [record["step"] for record in records.read()] == [4]
