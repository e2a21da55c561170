"""Data sets with slips: COCO, VOC, VG, NUS-WIDE, CUB, captions, scenes; each slip is one line."""
import copy
import io
import json
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest

import data
from config import Config
from tools import check
import fake_datasets as fake
from support import UserError
from fake_datasets import refused
from small_world import trained, world
from datasets import scenes, vg200


def change(record, key, value):
    record = copy.deepcopy(record)
    record[key] = value
    return record


BOXES = {
    "box of three": [1, 2, 3],
    "box of a word": [1, 2, "wide", 4],
    "box of 401 digits": [10**400, 1, 1, 1],
}


def edit(content, case):
    images, notes, categories = content["images"], content["annotations"], content["categories"]
    if case == "leaves the root":
        images[0]["file_name"] = "../../etc/passwd"
    elif case == "leaves by backslash":
        images[0]["file_name"] = "..\\secret.jpg"
    elif case == "absolute name":
        images[0]["file_name"] = "/etc/passwd"
    elif case == "image twice":
        images.append(copy.deepcopy(images[0]))
    elif case == "file twice":
        images.append(change(images[0], "id", 987654))
    elif case == "no file name":
        del images[1]["file_name"]
    elif case == "missing photo":
        images[1]["file_name"] = "nothere.jpg"
    elif case == "unknown image":
        notes[0]["image_id"] = 424242
    elif case == "unknown category":
        notes[0]["category_id"] = 12
    elif case in BOXES:
        notes[0]["bbox"] = BOXES[case]
    elif case.startswith("annotations are "):
        content["annotations"] = json.loads(case.split()[-1])
    elif case == "images are 5":
        content["images"] = 5
    elif case == "note is null":
        notes[0] = None
    elif case == "category without a name":
        del categories[3]["name"]
    elif case == "category name twice":
        categories[3]["name"] = "person"
    elif case == "no annotations key":
        del content["annotations"]
    return json.dumps(content)


JSON = {
    "leaves the root": "leads out of",
    "leaves by backslash": "leads out of",
    "absolute name": "leads out of",
    "image twice": "image id: 9 is listed twice",
    "file twice": "is listed twice",
    "no file name": "images with file_name and id",
    "missing photo": "1 of 10 images are missing",
    "unknown image": "an annotation needs .*'image_id': 424242",
    "unknown category": "an annotation needs .*'category_id': 12",
    **dict.fromkeys(BOXES, "an annotation needs"),
    "annotations are null": "expected COCO's",
    "annotations are 5": "expected COCO's",
    "images are 5": "expected COCO's",
    "note is null": "an annotation needs .*None",
    "category without a name": "categories with id and name",
    "category name twice": "category: person is listed twice",
    "no annotations key": "'annotations'",
}


@pytest.mark.parametrize("case", JSON)
def test_bad_annotations(coco, tmp_path, case):
    root, content = coco
    for folder in ("train2014", "val2014"):
        (tmp_path / folder).symlink_to(root / folder)
    fake.write(
        tmp_path / "annotations/instances_val2014.json",
        (root / "annotations/instances_val2014.json").read_text(),
    )
    fake.write(
        tmp_path / "annotations/instances_train2014.json", edit(copy.deepcopy(content), case)
    )
    assert "instances_train2014.json" in refused(JSON[case], "coco", tmp_path)


def test_boxes_that_real_files_hold(coco, tmp_path):
    """Up to the edge and a rounding beyond; without a height, as COCO's annotation 918; iscrowd
    left out."""
    shutil.copytree(coco[0], tmp_path / "c")
    content = copy.deepcopy(coco[1])
    for note, box in zip(
        content["annotations"], ([0, 0, 80, 60], [40.01, 30.01, 40.0, 30.0], [-0.01, 5, 8, 0.0])
    ):
        note["bbox"] = box
        del note["iscrowd"]
    fake.write(tmp_path / "c/annotations/instances_train2014.json", json.dumps(content))
    boxes = np.concatenate(fake.load("coco", tmp_path / "c")[0].boxes)[:, 1:]
    for box in (
        [0, 0, 1, 1],
        [40.01 / 80, 30.01 / 60, 80.01 / 80, 60.01 / 60],
        [-0.01 / 80, 5 / 60, 7.99 / 80, 5 / 60],
    ):
        assert np.isclose(boxes, box, rtol=1e-6, atol=1e-9).all(1).any()


@pytest.mark.parametrize(
    "text,match",
    [
        (b'{"images": [{"id": 1, "file_na', "not valid JSON.*is the download complete"),
        (b"", "not valid JSON"),
        (b"[1, 2]", "expected COCO's"),
        (b"null", "expected COCO's"),
        (b'{"a": "\xff\xfe"}', "not valid JSON"),
    ],
)
def test_broken_json(coco, tmp_path, text, match):
    shutil.copytree(coco[0], tmp_path / "c")
    (tmp_path / "c/annotations/instances_train2014.json").write_bytes(text)
    refused(match, "coco", tmp_path / "c")


def test_folders_and_arguments(coco, tmp_path):
    refused("no such folder", "coco", tmp_path / "nowhere")
    refused("annotations/instances_train2014.json not found", "coco", tmp_path)
    refused("say with --root", "coco")
    refused("unknown data set 'imagenet'", "imagenet", tmp_path)
    (tmp_path / "file").write_text("")
    refused("no such folder", "voc2007", tmp_path / "file")
    (tmp_path / "annotations").mkdir()
    (tmp_path / "annotations/instances_train2014.json").mkdir()
    (tmp_path / "train2014").mkdir()
    refused("cannot be read", "coco", tmp_path)  # a folder where a file should be
    root = coco[0]
    for match, options in (
        ("expected one of --single-positive", dict(ratio=0.5, single_positive="largeloss")),
        ("--val expects a share", dict(val=1.5)),
        ("--val expects a share", dict(val="x.csv")),
        ("cannot be read", dict(names=tmp_path / "none.txt")),
        ("the file is empty", dict(mask=tmp_path / "file")),
        ("no positive label", dict(ratio=1e-9)),
        ("lower --val, or", dict(val=0.99)),
        ("holds none out", dict(val=0.01)),
    ):
        refused(match, "coco", root, **options)


def test_folder_that_links_to_itself(coco, tmp_path):
    shutil.copytree(coco[0], tmp_path / "c")
    shutil.rmtree(tmp_path / "c/train2014")
    (tmp_path / "c/train2014").symlink_to(tmp_path / "c/train2014")
    refused("c: train2014 not found", "coco", tmp_path / "c")


def replace(path, old, new):
    content = Path(path).read_bytes()
    assert old in content
    Path(path).write_bytes(content.replace(old, new, 1))


def test_voc(tmp_path):
    fake.voc(tmp_path)
    main = tmp_path / "VOCdevkit/VOC2007/ImageSets/Main"
    dog, keep = main / "dog_trainval.txt", (main / "dog_trainval.txt").read_bytes()
    dog.write_bytes(keep.replace(b"000001 -1", b"000001 2"))
    refused("dog_trainval.txt: expected .*'2'", "voc2007", tmp_path)
    dog.write_bytes(b"\r\n".join(keep.split(b"\r\n")[:5]))
    refused("dog_trainval.txt: expected .*'000005'", "voc2007", tmp_path)
    dog.write_bytes(keep.replace(b"000003", b"999999"))
    refused("dog_trainval.txt: expected .*'000003'", "voc2007", tmp_path)
    dog.write_bytes(keep[:40] + b"\xff\xfe\r\n")
    refused(r"dog_trainval.txt:4: not UTF-8", "voc2007", tmp_path)
    dog.write_bytes(keep)
    (tmp_path / "VOCdevkit/VOC2007/JPEGImages/000004.jpg").unlink()
    refused("1 of 10 images are missing", "voc2007", tmp_path)
    xml = tmp_path / "xml"
    fake.voc(xml, class_files=False)
    note = xml / "VOCdevkit/VOC2007/Annotations/000000.xml"
    keep = note.read_text()
    for text in (
        keep[:-20],
        keep.replace("<name>aeroplane", "<name>unicorn"),
        "",
        *(f'<?xml version="1.0" encoding="{code}"?>{keep}' for code in ("hex", "rot13", "nope")),
    ):
        note.write_text(text)
        refused("000000.xml: not an annotation", "voc2007", xml)


MAIN, SPLIT = "VOCdevkit/VOC2007/ImageSets/Main", "CUB_200_2011/train_test_split.txt"

ATTRIBUTES = "CUB_200_2011/attributes/image_attribute_labels.txt"

INDEX, CONCEPTS, NUS = (
    "vg_category_500_labels_index.json",
    "ConceptsList/Concepts81.txt",
    "ImageList/TrainImagelist.txt",
)


SINGLE, EMPTY, TWICE = "nus_train_singlelabel.txt", "the file is empty", "is listed twice"


@pytest.mark.parametrize(
    "name,file,old,new,match",
    [  # old None: the whole file
        # one twice, one missing
        (
            "voc2007",
            f"{MAIN}/dog_trainval.txt",
            b"000003",
            b"000002",
            "dog_trainval.txt: expected .*'000003'",
        ),
        ("voc2007", f"{MAIN}/trainval.txt", b"000003", b"000002", f"000002.jpg {TWICE}"),
        ("voc2007", f"{MAIN}/trainval.txt", None, b"", f"trainval.txt: {EMPTY}"),
        (
            "cub",
            ATTRIBUTES,
            b"1 3 0 3 3.5\n",
            b"1 3 0 3 3.5\n1 3 1 3 3.5\n",
            "labels.txt: expected",
        ),
        (
            "cub",
            SPLIT,
            b"16 0\n",
            b"",
            "split.txt: expected 16 lines, got 15",
        ),
        (
            "cub",
            "attributes.txt",
            b"bill_color::large_(16_-_32_in)",
            b"bill_color::blue",
            f"has_bill_color::blue {TWICE}",
        ),
        # once in each split
        (
            "cub",
            "CUB_200_2011/images.txt",
            b"002.Bird_1/Bird_0001",
            b"002.Bird_1/Bird_0013",
            f"Bird_0013.jpg {TWICE}",
        ),
        ("vg200", "train_list_500.txt", None, b"\n", f"train_list_500.txt: {EMPTY}"),
        ("vg200", INDEX, b'"0.jpg"', b'"00.jpg"', f"{INDEX}: expected .*0.jpg"),
        (
            "nuswide",
            CONCEPTS,
            b"concept03\r\n",
            b"",
            "Concepts81.txt: expected 81 lines, got 80",
        ),
        ("nuswide", CONCEPTS, b"concept03", b"concept03\r\nmore", "got 82"),
        ("nuswide", CONCEPTS, None, b"", EMPTY),
        ("nuswide", NUS, None, b"", f"TrainImagelist.txt: {EMPTY}"),
        ("nuswide splc", SINGLE, b",0\n", b",\n", "label.txt:1: expected .*one idx"),
        ("nuswide splc", SINGLE, b",0\n", b",0 3\n", "label.txt:1: expected .*one idx"),
        ("cub splc", "cub_train.txt", b", 1\n", b", 312\n", "cub_train.txt:1: expected"),
    ],
    ids=lambda value: "" if isinstance(value, bytes) or value is None else Path(value).name,
)
def test_lists_that_contradict_themselves(tmp_path, name, file, old, new, match):
    name, setting = (name + " ").split(" ", 1)
    fake.MAKERS[name](tmp_path)
    replace(tmp_path / file, (tmp_path / file).read_bytes() if old is None else old, new)
    refused(match, name, tmp_path, single_positive=setting.strip() or None)


def test_vg_names_need_objects(tmp_path, capsys):
    fake.vg200(tmp_path)
    fake.write(tmp_path / "objects.json", '[{"image_id": 5}]')
    refused("not Visual Genome's", tmp_path, tmp_path / "objects.json", call=vg200.match_names)
    assert check.main(["coco", "--root", str(tmp_path), "--objects", "objects.json"]) == 2
    assert "--objects needs vg200 and --root" in capsys.readouterr().err


def test_vg200(tmp_path):
    fake.vg200(tmp_path)
    names = tmp_path / "vg_category_200.txt"
    keep = names.read_text()
    names.write_text("\n".join(keep.splitlines()[:150]))
    refused(
        "vg_category_200.txt: expected 200 lines, got 150", "vg200", tmp_path
    )
    names.unlink()
    refused("not found: give --names FILE or find it", "vg200", tmp_path)
    names.write_text(keep)
    index = tmp_path / "vg_category_500_labels_index.json"
    index.write_text(index.read_text()[:200])
    refused("vg_category_500_labels_index.json: not valid JSON", "vg200", tmp_path)
    shutil.rmtree(tmp_path / "VG_100K")
    index.write_text(json.dumps({}))
    refused("for every image of train_list_500.txt", "vg200", tmp_path)


def test_nuswide(tmp_path):
    fake.nuswide(tmp_path)
    path = tmp_path / "Groundtruth/TrainTestLabels/Labels_concept05_Train.txt"
    keep = path.read_text()
    path.write_text(keep[:-2])
    refused("Labels_concept05_Train.txt: expected 10 values of 0 or 1", "nuswide", tmp_path)
    path.write_text(keep.replace("0", "2", 1))
    refused("Labels_concept05_Train.txt: expected 10 values of 0 or 1", "nuswide", tmp_path)
    path.write_text(keep)
    path = path.with_name("Labels_concept00_Train.txt")
    keep = path.read_text()
    assert "1" in keep
    want = fake.load("nuswide", tmp_path)[0]
    path.write_text(keep.replace("\n", ".0\n"), encoding="utf-8-sig")  # as spreadsheets write it
    assert (fake.load("nuswide", tmp_path)[0].truth == want.truth).all()
    path.write_text(keep)
    np.save(tmp_path / "formatted_train_labels.npy", np.zeros((3, 81)))
    refused("expected 10 images x 81", "nuswide", tmp_path, single_positive="largeloss")
    np.save(tmp_path / "formatted_train_labels.npy", np.array([None]))
    # pickles are never loaded
    refused("not an array file", "nuswide", tmp_path, single_positive="largeloss")
    replace(tmp_path / "nus_train_singlelabel.txt", b",", b",81 ")
    refused("nus_train_singlelabel.txt:1: expected", "nuswide", tmp_path, single_positive="splc")
    replace(tmp_path / "nus_train_singlelabel.txt", b",81 ", b",-1 ")
    refused("nus_train_singlelabel.txt:1: expected", "nuswide", tmp_path, single_positive="splc")
    (tmp_path / "nus_val.txt").unlink()
    refused("nus_val.txt not found.*--lists", "nuswide", tmp_path, single_positive="splc")
    refused("--val: SPLC.s list", "nuswide", tmp_path, single_positive="splc", val=0.4)
    shutil.rmtree(tmp_path / "Flickr")
    shutil.rmtree(tmp_path / "images")
    refused("its photos are not in Flickr/", "nuswide", tmp_path)


def array_file(case):
    """The bytes of a .npy or .npz that is damaged, or is not what it is called."""
    buffer, array = io.BytesIO(), np.zeros((10, 20))
    if case.startswith("header"):
        text = {
            "header damaged": "{'descr': '<f8', 'fortran_order': (",
            "header of 10**13 rows": f"{{'descr': '<f8', 'fortran_order': False, 'shape': "
            f"({10**13}, 20)}}",
            "header of an object": "{'descr': '|O', 'fortran_order': False, 'shape': (10, 20)}",
        }[case].ljust(117) + "\n"
        return b"\x93NUMPY\1\0" + struct.pack("<H", 118) + text.encode() + bytes(8)
    (np.savez_compressed if case == "zip damaged" else np.savez)(
        buffer, array, **({"b": array} if case == "two arrays" else {})
    )
    content = bytearray(buffer.getvalue())
    central = content.index(b"PK\1\2")
    if case == "zip encrypted":
        content[6] = content[central + 8] = 1
    elif case == "zip of unknown compression":
        content[8] = content[central + 10] = 99
    elif case == "zip damaged":
        content[60:80] = b"\xff" * 20
    return bytes(content[:100] if case == "zip cut" else content)


@pytest.mark.parametrize(
    "case",
    [
        "header damaged",
        "header of 10**13 rows",
        "header of an object",
        "zip encrypted",
        "zip of unknown compression",
        "zip damaged",
        "zip cut",
        "two arrays",
    ],
)
def test_damaged_arrays(tmp_path, case):
    table = data.Split("x", [], list("abcdefghijklmnopqrst"), np.ones((10, 20), np.int8))
    fake.nuswide(tmp_path)
    for name in ("mask.npy", "mask.npz", "formatted_train_labels.npy"):
        (tmp_path / name).write_bytes(array_file(case))
        refused("not an array file", tmp_path / name, table, call=data.read_mask)
    refused(
        "formatted_train_labels.npy: not an array file",
        "nuswide",
        tmp_path,
        single_positive="largeloss",
    )


def test_arrays_are_known_by_their_content(tmp_path):
    table = data.Split("x", [], list("abcdefghijklmnopqrst"), np.ones((10, 20), np.int8))
    for name in ("mask.npy", "mask.npz"):
        (tmp_path / name).write_bytes(array_file("an npz"))
        assert not data.read_mask(tmp_path / name, table).any()


def test_cub(tmp_path):
    fake.cub(tmp_path)
    names = tmp_path / "attributes.txt"
    names.write_text(names.read_text().replace("::", "="))
    assert "=" in fake.load("cub", tmp_path)[0].prompts[0]  # names of another form stay
    path = tmp_path / "CUB_200_2011/attributes/image_attribute_labels.txt"
    keep = path.read_bytes()
    path.write_bytes(keep[: len(keep) // 2])
    refused("image_attribute_labels.txt: expected", "cub", tmp_path)
    path.unlink()
    refused("image_attribute_labels.txt: cannot be read, check the path", "cub", tmp_path)
    path.write_bytes(keep)
    replace(tmp_path / "CUB_200_2011/images.txt", b"3 ", b"33 ")
    refused("ids 1, 2, 3", "cub", tmp_path)
    (tmp_path / "attributes.txt").unlink()
    refused("attributes.txt not found", "cub", tmp_path)


def test_splc_list_against_the_annotations(tmp_path):
    fake.coco(tmp_path)
    path = tmp_path / "coco_train_singlelabel.txt"
    first, _, rest = path.read_text().partition("\n")
    path.write_text(first.split(",")[0] + ",79\n" + rest)
    refused(
        "coco_train_singlelabel.txt: the annotations deny",
        "coco",
        tmp_path,
        single_positive="splc",
    )
    path.write_text("other.jpg,3\n" + rest)
    refused(
        "1 of its images are not in coco's training set", "coco", tmp_path, single_positive="splc"
    )
    (tmp_path / "mine.txt").write_text("other.jpg,3\n" + rest)  # the list itself as --lists
    refused("mine.txt: 1 of its images are not in coco's training set", "coco", tmp_path,
            single_positive="splc", lists=tmp_path / "mine.txt")


def test_splits_of_one_data_set_name_the_same_classes(tmp_path):
    root = tmp_path / "coco"
    fake.coco(root)
    file = root / "annotations/instances_val2014.json"
    file.write_text(file.read_text().replace('"person"', '"people"'))
    refused(f"{root}: its splits name different classes", "coco", root)


def test_captions_with_a_byte_order_mark(tmp_path):
    content = {"images": [{"id": 1}], "annotations": [{"image_id": 1, "caption": "a dog"}]}
    (tmp_path / "c.json").write_bytes(json.dumps(content).encode("utf-8-sig"))
    assert fake.captions(tmp_path / "c.json", "dog").paths == ["a dog"]


FEW = dict(train=1, val=1, test=1, size=64, workers=1)


@pytest.mark.parametrize("case", ["here", "link", "dangling link"])
def test_scenes_roots_that_hold_nothing(tmp_path, monkeypatch, case):
    (tmp_path / "home").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / ("home" if case == "link" else "new"))
    monkeypatch.chdir(tmp_path / "home")
    scenes.write({"here": "."}.get(case, "../link"), **FEW)
    assert (tmp_path / {"here": "home"}.get(case, "link") / "scenes.json").is_file()
    assert {p.name for p in tmp_path.iterdir() if p.suffix != ".lock"} <= {"home", "link", "new"}
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("case", ["new/..", "loop"])
def test_scenes_roots_that_are_refused_before_drawing(tmp_path, monkeypatch, case):
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    monkeypatch.setattr(scenes, "draw_all", None)
    with pytest.raises(ValueError, match="should hold scenes .* delete it or name another root"):
        scenes.write(tmp_path / case, **FEW)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["loop"]


@pytest.mark.parametrize("listed, stored", (("NFC", "NFD"), ("NFD", "NFC")))
def test_a_name_in_another_unicode_normal_form_is_the_same_name(tmp_path, listed, stored):
    from unicodedata import normalize

    fake.coco(tmp_path)
    path = tmp_path / "annotations/instances_train2014.json"
    content = json.loads(path.read_text())
    old = tmp_path / "train2014" / content["images"][0]["file_name"]
    old.rename(old.with_name(normalize(stored, "Zürich.jpg")))
    content["images"][0]["file_name"] = normalize(listed, "Zürich.jpg")
    path.write_text(json.dumps(content))
    assert Path(fake.load("coco", tmp_path)[0].paths[0]).is_file()


@pytest.mark.parametrize("first", (True, False))
def test_other_packages_of_our_names_work_beside_ours(tmp_path, world, trained, first):
    """Hugging Face's datasets and kernels and OpenAI's clip, before or after our Predictor."""
    import subprocess
    import sys

    for name in ("datasets", "clip", "kernels"):
        (tmp_path / "site" / name).mkdir(parents=True)
        (tmp_path / "site" / name / "__init__.py").write_text("def load_dataset(): return 'theirs'")
    root = Path(__file__).resolve().parents[1]
    photo = sorted((world / "scenes" / "val2014").iterdir())[0]
    theirs = "from datasets import load_dataset; import clip, kernels; "
    code = (f"import sys; sys.path.insert(0, 'site'); sys.path.append({str(root / 'tools')!r}); "
            f"{theirs * first}from trm_ml import Predictor; {theirs}"
            f"p = Predictor({str(trained)!r}, 'last'); "
            f"assert p.predict([{str(photo)!r}]) and p.inspect({str(photo)!r}); "
            "print(load_dataset(), clip.__file__, kernels.__file__)")
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True,
                          text=True)
    assert done.returncode == 0 and done.stdout.startswith("theirs"), done.stderr
    assert done.stdout.count(str(tmp_path / "site")) == 2


@pytest.mark.parametrize("first", (True, False))
@pytest.mark.parametrize("inside", (False, True))
def test_a_programs_own_modules_keep_their_names(tmp_path, world, trained, first, inside):
    """inside: the program is kept in a folder of the project."""
    import subprocess
    import sys
    from tools import trm_ml

    root = Path(__file__).resolve().parents[1]
    ours = {path.stem for path in root.iterdir()
            if path.suffix == ".py" or (path / "__init__.py").is_file()} - {"tests"}
    assert ours == set(trm_ml.NAMES)
    photo = sorted((world / "scenes" / "val2014").iterdir())[0]
    program = tmp_path
    if inside:
        skip = shutil.ignore_patterns(".*", "generated", "runs", "tests", "walkthrough.html")
        root = shutil.copytree(root, tmp_path / "project", ignore=skip)
        program = root / "mine"
        program.mkdir()
    for name in ours:
        (program / f"{name}.py").write_text("MINE = True")
    theirs = f"import {', '.join(sorted(ours))}; "
    code = (f"import sys; sys.path.append({str(root / 'tools')!r}); "
            f"{theirs * first}from trm_ml import Predictor; {theirs}"
            f"p = Predictor({str(trained)!r}, 'last'); "
            f"assert p.predict([{str(photo)!r}]); labels = [1] + [0] * (len(p.names) - 1); "
            f"assert 'losses' in p.inspect({str(photo)!r}, labels); p.splits(); "
            f"print(all(sys.modules[name].MINE for name in {sorted(ours)}))")
    done = subprocess.run([sys.executable, "-c", code], cwd=program, capture_output=True,
                          text=True)
    assert done.stdout == "True\n", done.stderr


@pytest.mark.parametrize("order", ("look; ours", "ours; look"))
def test_a_program_may_look_whether_kernels_is_installed(tmp_path, order):
    """transformers imports `kernels`, which may be ours, to ask for its version."""
    import subprocess
    import sys

    (tmp_path / "datasets").mkdir()
    (tmp_path / "datasets" / "__init__.py").write_text("def load_dataset(): return 'theirs'")
    steps = {"look": "import datasets, kernels; assert not hasattr(kernels, '__version__')",
             "ours": "from trm_ml import Predictor"}
    root = Path(__file__).resolve().parents[1]
    code = "; ".join([f"import sys; sys.path += [{str(root)!r}, {str(root / 'tools')!r}]",
                      *(steps[step] for step in order.split("; ")),
                      "print(datasets.load_dataset())"])
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True,
                          text=True)
    assert done.stdout == "theirs\n", done.stderr


def changed(root, edit):
    """The COCO tree with edit(content) of its training list."""
    path = root / "annotations/instances_train2014.json"
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))
    return fake.load("coco", root)[0]


@pytest.mark.parametrize("size", (None, 0, "left out"))
def test_labels_need_no_sizes_of_images(tmp_path, size):
    def edit(content):
        for image in content["images"]:
            if size == "left out":
                del image["width"], image["height"]
            else:
                image |= {"width": size, "height": size}

    fake.coco(tmp_path)
    before = fake.load("coco", tmp_path)[0]
    train = changed(tmp_path, edit)
    assert (train.labels == before.labels).all() and not any(map(len, train.boxes))


def test_file_names_of_coco_may_hold_the_folder(tmp_path):
    def edit(content):
        for image in content["images"]:
            image["file_name"] = "train2014/" + image["file_name"]

    fake.coco(tmp_path)
    assert changed(tmp_path, edit).paths == fake.load("coco", tmp_path)[0].paths


@pytest.mark.parametrize("name", sorted(set(data.LAYOUTS) - {"scenes"}))
def test_without_a_root_it_is_told_where_to_look_what_is_needed(name):
    with pytest.raises(UserError, match=f"^{name}: say with --root which folder .*docs/data.md"):
        data.load(Config(data=name))
    assert f"| `{name}` | http" in (data.SCENES.parents[1] / "docs/data.md").read_text("utf-8")


@pytest.mark.parametrize("there", ("annotations/instances_val2017.json", "images/train2017/a.jpg"))
def test_a_part_of_coco_2017_says_what_it_is(tmp_path, there):
    fake.write(tmp_path / there, "{}")
    refused("COCO 2017", "coco", tmp_path)


def test_want_of_memory_is_not_called_a_damaged_file(tmp_path, monkeypatch):
    from datasets.base import read_json

    (tmp_path / "x.json").write_text("[]")

    def loads(*_, **__):
        raise MemoryError

    monkeypatch.setattr("datasets.base.json.loads", loads)
    with pytest.raises(MemoryError):
        read_json(tmp_path / "x.json")


def test_nuswide_in_one_flat_folder_and_one_merged_file_is_the_same(tmp_path):
    fake.nuswide(tmp_path / "a")
    want = fake.load("nuswide", tmp_path / "a")[0]
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    labels = tmp_path / "b/Groundtruth/TrainTestLabels"
    for part in ("Train", "Test"):
        columns = [(labels / f"Labels_concept{c:02d}_{part}.txt").read_text().split()
                   for c in range(81)]
        (tmp_path / f"b/Groundtruth/Labels_{part}.txt").write_text(
            "".join(" ".join(row) + "\n" for row in zip(*columns)))
    shutil.rmtree(labels)
    for photo in list((tmp_path / "b/Flickr").rglob("*.jpg")):
        photo.rename(tmp_path / "b/Flickr" / photo.name)
    got = fake.load("nuswide", tmp_path / "b")[0]
    assert [Path(path).name for path in got.paths] == [Path(path).name for path in want.paths]
    assert np.array_equal(got.labels, want.labels) and (got.labels == 1).any(1).sum() > 5


def test_voc_drops_an_image_whose_objects_are_all_difficult(tmp_path):
    fake.voc(tmp_path, 2007)
    main = tmp_path / "VOCdevkit/VOC2007/ImageSets/Main"
    for file in main.glob("*_trainval.txt"):
        lines = file.read_text().splitlines()
        file.write_text("\n".join([lines[0].replace(" 1", " 0"), *lines[1:]]))
    train = fake.load("voc2007", tmp_path)[0]
    assert "000000.jpg" not in {Path(path).name for path in train.paths}
    assert train.info["dropped"]["without a positive"] == 1
