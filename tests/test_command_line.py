"""The command line: values that cannot be, terminals, pipes, the commands beside the main ones."""
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image
from small_world import command, one_line, options, posix, ROOT, run, sheet, start, trained, world

import config
from tools import check, review
import fake_datasets as fake
import eval as evaluation
from paper import reproduce
from datasets import scenes
import train
from tools import build
from tools import pretrain
from support import UserError


@pytest.mark.parametrize(
    "main, arguments",
    [
        (train.main, ["--resume", ""]),
        (train.main, ["--root="]),
        (train.main, ["--data", ""]),
        (evaluation.main, [""]),
        (evaluation.main, ["x", "--image", ""]),
        (reproduce.main, ["--table", 3, "--rows", ""]),
    ],
)
def test_an_empty_value_is_refused(main, arguments, capfd):
    """--resume "$RUN" without a RUN would start a default training."""
    one_line(main, arguments, capfd, "empty")


@pytest.mark.parametrize(
    "main, arguments, words",
    [
        (train.main, ["--epochs", 10**30], ["--epochs", "up to"]),
        (train.main, ["--queue", 2**40], ["--queue", "up to"]),
        (train.main, ["--workers", 5000], ["--workers", "1000"]),
        (train.main, ["--val", "x.csv"], ["val", "x.csv"]),
        (evaluation.main, ["x", "--image", "a", "--top", 0], ["--top", "from 1"]),
        (evaluation.main, ["x", "--image", "a", "--workers", -1], ["--workers"]),
        (evaluation.main, ["x", "--csv", "all.csv"], ["--csv", "--image"]),
        (evaluation.main, ["x", "--out", "d"], ["--out", "--image"]),
        (reproduce.main, ["--table", 3, "--ratio=0.3"], ["--ratio", "drop it"]),
        (reproduce.main, ["--table", 3, "--without", "kd"], ["--without"]),
        (reproduce.main, ["--table", 3, "--seeds", 0], ["--seeds"]),
        (reproduce.main, ["--table", 3, "--resume=x"], ["--resume"]),
    ],
)
def test_a_value_that_cannot_be_is_refused(world, tmp_path, main, arguments, words, capfd):
    more = {
        train.main: options(world, tmp_path / "run")[2:],
        reproduce.main: ["--root", world / "scenes", "--out", tmp_path],
    }.get(main, [])
    one_line(main, [*more, *arguments], capfd, *words)


def test_capitals_do_not_change_the_recipe_of_a_data_set():
    assert config.parse(["--data", "Scenes"]) == config.parse(["--data", "scenes"])


def test_clip_of_table_2_is_the_one_that_is_given(tmp_path):
    parsed = [
        reproduce.parse(["--table", "2", "--data", "coco", "--root", str(tmp_path), *given])[1].clip
        for given in ([], ["--clip", "RN101"], ["--clip=RN101"])
    ]
    assert parsed == ["RN50", "RN101", "RN101"]


@pytest.mark.parametrize("val", ("none", "of unknowns", "of negatives"))
def test_without_a_validation_that_can_judge_the_last_epoch_is_taken(
    sheet, world, tmp_path, capfd, val
):
    lines = sheet[1].read_text().splitlines()
    held = fake.load(sheet[1], val=0.25)[1].listed
    for i, line in enumerate(lines):
        if val != "none" and line.split(",")[0] in held:
            lines[i] = line.split(",")[0] + (",0,0,0" if val == "of negatives" else ",,,")
    sheet[1].write_text("\n".join(lines))
    run(
        world,
        tmp_path / "r",
        data=sheet[1],
        root=None,
        ratio=None,
        epochs=3,
        val=0 if val == "none" else 0.25,
    )
    assert "no best epoch" in capfd.readouterr().out and not (tmp_path / "r" / "best.pt").exists()
    assert evaluation.Predictor(tmp_path / "r").epoch == 3
    one_line(
        evaluation.main,
        [tmp_path / "r", "--suggest", tmp_path / "s.csv", "--checkpoint", "best"],
        capfd,
        "--checkpoint last",
    )


def test_rows_that_forget_the_header_or_the_image(tmp_path):
    for name in "abc":
        Image.new("RGB", (40, 30)).save(tmp_path / f"{name}.png")
    file = tmp_path / "x.csv"
    file.write_text("a.png,1,0\nb.png,0,1\n")
    with pytest.raises(UserError, match="x.csv:1: expected a header"):
        fake.load(file)
    file.write_text("image,cup,sun\n,1,0\nb.png,0,1\n")  # once read as the row of prompts
    with pytest.raises(UserError, match="x.csv:2: no image '' in"):
        fake.load(file)
    file.write_text("image,cup,sun\n#prompt,a cup,the sun\nb.png,0,1\na.png,1,0\n")
    assert fake.load(file, val=0.0)[0].prompts == ["a cup", "the sun"]


@posix
def test_one_image_under_two_paths_is_one_image(tmp_path, monkeypatch):
    (tmp_path / "real").mkdir()
    (tmp_path / "linked").symlink_to("real")
    Image.new("RGB", (40, 30)).save(tmp_path / "real" / "a.png")
    (tmp_path / "x.csv").write_text(f"image,cup\na.png,1\n{tmp_path / 'real' / 'a.png'},0\n")
    monkeypatch.chdir(tmp_path)
    for root in ("real", "linked", tmp_path / "linked"):
        with pytest.raises(UserError, match="x.csv:3: .* already on line 2"):
            fake.load("x.csv", root)
    (tmp_path / "real" / "link.png").symlink_to("a.png")
    Image.new("RGB", (40, 30)).save(tmp_path / "real" / "b.png")
    (tmp_path / "x.csv").write_text("image,cup\na.png,1\nlink.png,0\n")
    with pytest.raises(UserError, match="x.csv:3: link.png is already on line 2"):
        fake.load("x.csv", "real")
    (tmp_path / "x.csv").write_text("image,cup\na.png,1\nb.png,0\n")
    (tmp_path / "val.csv").write_text("image,cup\nlink.png,1\n")
    with pytest.raises(UserError, match="1 images are in another sheet"):
        fake.load("x.csv", "real", val="val.csv")


@pytest.mark.parametrize("content", ("object", "text", "huge", "1e400", "zip", "two"))
def test_odd_mask_files(world, tmp_path, content):
    file = tmp_path / (
        "mask.txt"
        if content in ("huge", "1e400")
        else "mask.npz"
        if content in ("zip", "two")
        else "mask.npy"
    )
    if content in ("huge", "1e400"):
        file.write_text("99999999999999999999999 1\n" if content == "huge" else "1e400 1\n")
    elif content == "zip":
        file.write_bytes(b"PK\x03\x04 no archive")
    elif content == "two":
        np.savez(file, a=np.ones((24, 28)), b=np.ones((24, 28)))
    else:
        np.save(
            file, np.array([["a", "b"]]) if content == "text" else np.array([{}]), allow_pickle=True
        )
    with pytest.raises(UserError, match="mask") as error:
        fake.load("scenes", world / "scenes", mask=file)
    assert str(file) in str(error.value) and "\n" not in str(error.value)


def test_captions_that_cannot_be_searched(world, tmp_path):
    file = tmp_path / "captions.json"
    shutil.copy(world / "scenes" / "annotations" / "captions_train2014.json", file)
    with pytest.raises(UserError, match="猫.*rename"):
        fake.captions(file, "cup", "猫")


def test_a_name_too_long_for_clip_is_told_before_the_images_are_decoded(
    world, tmp_path, capfd, monkeypatch
):
    names = json.loads((world / "scenes/annotations/instances_train2014.json").read_text())[
        "categories"
    ]
    (tmp_path / "names.txt").write_text(
        "\n".join(" ".join("abcdefghijklmnopqrstuvwxyz") + str(i) for i, _ in enumerate(names))
    )
    monkeypatch.setattr(build, "FeatureLoader", None)
    one_line(
        train.main, options(world, tmp_path / "run", names=tmp_path / "names.txt"), capfd, "tokens"
    )


@posix
def test_names_that_a_picture_or_a_terminal_cannot_show(trained, tmp_path):
    photo = sorted((trained.parent / "scenes" / "val2014").iterdir())[0]
    (tmp_path / "p").mkdir()
    for name in ("two\nlines.jpg", "猫.jpg", os.fsdecode(b"caf\xe9.jpg")):
        shutil.copy(photo, tmp_path / "p" / name)
    arguments = [
        "eval.py",
        trained,
        "--image",
        tmp_path / "p",
        "--out",
        tmp_path / "out",
        "--csv",
        tmp_path / "all.csv",
    ]
    for encoding in ("ascii", "utf-8"):
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        (tmp_path / "all.csv").unlink(missing_ok=True)
        done = subprocess.run(
            [sys.executable, *map(str, arguments)],
            cwd=ROOT,
            capture_output=True,
            env=os.environ | {"PYTHONIOENCODING": encoding},
        )
        assert done.returncode == 0 and done.stderr == b"", done.stderr
        assert (
            len(list((tmp_path / "out").iterdir())) == 3
            and b"caf\xe9.jpg" in (tmp_path / "all.csv").read_bytes()
        )


@posix
def test_what_lies_among_photos_costs_only_itself(trained, tmp_path, capfd):
    photo = sorted((trained.parent / "scenes" / "val2014").iterdir())[0]
    (tmp_path / "p" / "folder.jpg").mkdir(parents=True)
    (tmp_path / "p" / "broken.jpg").symlink_to("nowhere")
    os.mkfifo(tmp_path / "p" / "pipe.jpg")
    for name in ("a" * 251 + ".jpg", "猫" * 83 + ".jpg", "b.jpg"):
        shutil.copy(photo, tmp_path / "p" / name)
    status, out, err = command(
        evaluation.main, [trained, "--image", tmp_path / "p", "--out", tmp_path / "out"], capfd
    )
    assert status == 0 and len(out) == 4 and len(list((tmp_path / "out").iterdir())) == 3
    assert len(err) == 3 and "2 of 5 files are no readable images" in err[0]
    assert "broken.jpg (no such file)" in err[1] and "pipe.jpg (not a regular file)" in err[2]


@posix
def test_a_reader_that_goes_away_and_a_closed_stderr(trained, tmp_path):
    photos, pictures = trained.parent / "scenes" / "val2014", tmp_path / "out"
    first = start(
        "eval.py", trained, "--image", photos, "--out", pictures, "--pictures", 0, "--batch", 1
    )
    assert first.stdout.readline().startswith("probabilities")
    first.stdout.close()  # as `| head -1`
    assert first.stderr.read() == "" and first.wait() == 141


@posix
@pytest.mark.parametrize("closed", (">&-", "2>&-", "<&- >&- 2>&-"))
def test_a_command_without_outputs_works(trained, tmp_path, closed):
    """As some schedulers start one: a file that it opens must not become its output either."""
    photos, table = trained.parent / "scenes" / "val2014", tmp_path / "table.csv"
    words = ["eval.py", trained, "--image", photos, "--out", tmp_path / "out", "--csv", table]
    done = subprocess.run(["sh", "-c", f'exec "$@" {closed}', "sh", sys.executable, *words],
                          cwd=ROOT)
    assert done.returncode == 0 and len(table.read_text().splitlines()) == 13
    assert len(list((tmp_path / "out").iterdir())) == 12


@posix
def test_a_photo_of_a_hundred_megapixels_is_a_photo(trained, tmp_path, capfd):
    Image.new("RGB", (10000, 9500)).save(tmp_path / "large.png")
    done = subprocess.run(
        [
            sys.executable,
            "eval.py",
            trained,
            "--image",
            tmp_path / "large.png",
            "--out",
            tmp_path / "o",
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and done.stderr == "" and "large.png" in done.stdout


@pytest.mark.parametrize(
    "words, told",
    [
        ([scenes.main, "--rot", "x"], "--root"),
        ([scenes.main, "--root", "README.md"], "README.md"),
        ([review.main, "merge"], "sheet, answers"),
        ([check.main], "data"),
        ([check.main, "coco", "--rot", "x"], "--root"),
        ([check.main, "x.csv"], "x.csv"),
        ([check.main, "vg200", "--objects", "x.json"], "--root"),
        ([pretrain.main, "--epochs", "5"], "--epochs"),
    ],
)
def test_a_wrong_call_of_a_side_command_is_one_line(words, told, capfd, monkeypatch):
    main, *arguments = words
    monkeypatch.chdir(ROOT)
    one_line(main, arguments, capfd, told)


@pytest.mark.parametrize("note", (b"{", b"\xff\xfe"))
def test_scenes_beside_a_broken_note_are_left_alone(tmp_path, capfd, note):
    (tmp_path / "scenes.json").write_bytes(note)
    one_line(scenes.main, ["--root", tmp_path], capfd, "should hold scenes")
    assert (tmp_path / "scenes.json").read_bytes() == note


def test_zero_is_a_value_of_table_2(tmp_path):
    parsed = [
        reproduce.parse(["--table", "2", *given])[1].assume_negative
        for given in ([], ["--assume-negative", "0"])
    ]
    assert parsed == [None, 0.0]  # None: 0.3 where no label is known to be absent


@posix
@pytest.mark.parametrize("delay", (0.02, 0.06, 0.1, 0.15, 0.22))
def test_ctrl_c_while_loader_processes_begin(world, tmp_path, delay):
    arguments = options(world, tmp_path / "run", workers=2, cache_features=0, epochs=500)
    at_work = start("train.py", *arguments, start_new_session=True)
    assert at_work.stdout.readline()  # the line before the first epoch
    time.sleep(delay)
    os.killpg(at_work.pid, signal.SIGINT)
    out, err = at_work.communicate(timeout=60)
    assert at_work.returncode == 130 and "stopped; if the run had begun, --resume RUN" in err, err


TOLD_WHILE_STOPPING = """
import os, signal, sys
from support import cli

class Stderr:  # torch's handler raises for a loader process that the same Ctrl-C has ended
    def write(self, text):
        os.kill(os.getpid(), signal.SIGCHLD)
        sys.__stderr__.write(text)

def a_worker_is_gone(*_):
    raise RuntimeError("DataLoader worker (pid 7) exited unexpectedly with exit code 1")

def work():
    signal.signal(signal.SIGCHLD, a_worker_is_gone)
    sys.stderr = Stderr()
    os.kill(os.getpid(), signal.SIGINT)

status = cli.run_main(work)
sys.stderr = sys.__stderr__
sys.exit(status)
"""


@posix
def test_a_worker_that_ends_after_ctrl_c_says_nothing():
    done = subprocess.run(
        [sys.executable, "-c", TOLD_WHILE_STOPPING], cwd=ROOT, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (130, "\nstopped\n")


@pytest.mark.parametrize("error, told", (
    (RuntimeError("can't start new thread"), "--workers 0"),
    (RuntimeError("cannot join thread before it is started"), "ulimit -a"),
    (RuntimeError("unable to allocate shared memory(shm) for file </torch_1>: No space left on "
                  "device (28)"), "--shm-size"),
    (RuntimeError("received 0 items of ancdata"), "--workers 0"),
    (OSError(24, "Too many open files"), "--workers 0"),
    (BlockingIOError(11, "Resource temporarily unavailable"), "--workers 0"),
))
def test_a_limit_of_the_machine_is_one_line(error, told, capfd):
    from support.cli import run_main

    def work(_):
        raise error
    one_line(lambda words: run_main(lambda: work(words)), [], capfd, told)


@posix
def test_too_few_open_files_for_the_loader_are_one_line(world, tmp_path):
    words = options(world, tmp_path / "run", cache_features=0, workers=8)
    code = ("import resource, sys; resource.setrlimit(resource.RLIMIT_NOFILE, (48, 48)); "
            "import train; sys.exit(train.main())")
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code, *words], cwd=ROOT,
                          capture_output=True, text=True)
    *before, last = done.stderr.splitlines()
    assert done.returncode == 2 and last.startswith("error: ") and "--workers 0" in last
    # Python's fork server, the default from 3.14 on, tells of its own end by a traceback
    assert not before or multiprocessing.get_start_method() == "forkserver", done.stderr


def test_a_tilde_that_the_shell_left_alone_is_the_home_folder(monkeypatch):
    from support.cli import words

    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("USERPROFILE", "/home/me")
    assert words(["--root=~/coco", "~/a", "a~/b", "--out", "~/r", "~"]) == [
        "--root=/home/me/coco", "/home/me/a", "a~/b", "--out", "/home/me/r", "~"]


def test_help_without_docstrings():
    """One process for all three: without docstrings every package is compiled anew."""
    code = """import runpy, sys
for script in ("train.py", "eval.py", "data.py"):
    sys.argv = [script, "--help"]
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as end:
        if end.code:
            raise"""
    done = subprocess.run([sys.executable, "-OO", "-c", code], cwd=ROOT, capture_output=True,
                          text=True)
    assert done.returncode == 0 and done.stdout.count("usage: ") == 3, done.stderr
    for script in ("train.py", "eval.py", "data.py"):
        assert f"usage: {script}" in done.stdout
