"""The review page in a browser, and answers on their way into the sheet."""
import base64
import csv
import io
import json
import os
import time
from pathlib import Path

import pytest
from browser import Browser, needs_browser
from PIL import Image
from small_world import command, one_line, posix

import data
from config import Config

from tools.review import main, write_page

SHEET = 'image;dog;"small; cat";Hünd\r\nb.jpg;1;;\r\n"a.jpg";;"0";\r\n\r\nsub/c.jpg;;;1\r\n'


def answers(tmp_path, *rows, head="image,category,label"):
    (tmp_path / "answers.csv").write_text("\n".join([head, *rows]) + "\n", encoding="utf-8")
    return tmp_path / "answers.csv"


@pytest.mark.parametrize("encoding", ("utf-8", "utf-8-sig", "utf-16"))
@pytest.mark.parametrize("first", ("", "sep=;\r\n"))
def test_a_merge_fills_empty_cells_and_leaves_every_other_one(tmp_path, capfd, encoding, first):
    sheet = tmp_path / "labels.csv"
    sheet.write_bytes((first + SHEET).encode(encoding))
    file = answers(tmp_path, "sub/c.jpg,dog,0", "a.jpg,small; cat,0", "b.jpg,Hünd,1",
                   "b.jpg,dog,0", "a.jpg,dog,", "gone.jpg,dog,1", "b.jpg,no such,1")
    status, out, _ = command(main, ["merge", sheet, file], capfd)
    expected = first + SHEET.replace("b.jpg;1;;", "b.jpg;1;;1").replace("c.jpg;;", "c.jpg;0;")
    expected = expected.replace('"a.jpg";;"0"', "a.jpg;;0")  # quotes that csv does not need
    assert status == 0 and sheet.read_bytes() == expected.encode(encoding)
    assert (tmp_path / "labels.csv.1.bak").read_bytes() == (first + SHEET).encode(encoding)
    text = "\n".join(out)
    assert "6 answers: 2 new, 1 were there, 1 conflicts, 2 without a cell" in text
    assert "b.jpg, dog: sheet 1, answer 0" in text and "gone.jpg, dog" in text

    # a second backup does not replace the first
    sheet.write_bytes((first + SHEET).encode(encoding))
    assert command(main, ["merge", sheet, file], capfd)[0] == 0
    assert len(list(tmp_path.glob("*.bak"))) == 2
    done = sheet.read_bytes()
    assert command(main, ["merge", sheet, file], capfd)[0] == 0  # nothing is new: no third one
    assert sheet.read_bytes() == done and len(list(tmp_path.glob("*.bak"))) == 2


def test_the_last_cell_of_a_sheet_without_a_final_line_end_is_filled(tmp_path, capfd):
    (tmp_path / "x.csv").write_text('image,"two\nlines",dog\na.jpg,,')
    file = answers(tmp_path, "a.jpg,dog,1")
    assert command(main, ["merge", tmp_path / "x.csv", file], capfd)[0] == 0
    assert (tmp_path / "x.csv").read_text() == 'image,"two\nlines",dog\na.jpg,,1\n'


def test_answers_that_contradict_each_other_are_a_conflict(tmp_path, capfd):
    (tmp_path / "x.csv").write_text("image,dog\na.jpg,\n")
    file = answers(tmp_path, "a.jpg,dog,1", "a.jpg,dog,0")
    _, out, _ = command(main, ["merge", tmp_path / "x.csv", file], capfd)
    assert "1 conflicts" in out[1] and (tmp_path / "x.csv").read_text() == "image,dog\na.jpg,1\n"


def test_absent_is_written_as_the_sheet_has_it(tmp_path, capfd):
    sheet = tmp_path / "x.csv"
    file = answers(tmp_path, "a.jpg,dog,1", "b.jpg,dog,0")
    sheet.write_text("image,dog\na.jpg,?\nb.jpg,NA\nc.jpg,yes\nd.jpg,no\n")
    assert command(main, ["merge", sheet, file], capfd)[0] == 0
    assert sheet.read_text() == "image,dog\na.jpg,1\nb.jpg,0\nc.jpg,yes\nd.jpg,no\n"
    sheet.write_text("image,dog\na.jpg,0\nb.jpg,0\nc.jpg,1\n")
    assert command(main, ["merge", sheet, file, "--minus-one", "absent"], capfd)[0] == 0
    assert sheet.read_text() == "image,dog\na.jpg,1\nb.jpg,-1\nc.jpg,1\n"


@pytest.mark.parametrize("first", ("\n", ",,\n", "\n \n"))
def test_empty_rows_before_the_header_are_no_header(tmp_path, capfd, first):
    (tmp_path / "x.csv").write_text(first + "image,dog,cat\na.jpg,,\n")
    file = answers(tmp_path, "a.jpg,cat,1")
    assert command(main, ["merge", tmp_path / "x.csv", file], capfd)[0] == 0
    assert (tmp_path / "x.csv").read_text() == first + "image,dog,cat\na.jpg,,1\n"


def test_a_merge_into_cells_that_excel_left_out(tmp_path, capfd):
    sheet = tmp_path / "x.csv"
    sheet.write_bytes(b"image,dog,cat\r\na.jpg,1.00\r\nb.jpg\r\n")
    file = answers(tmp_path, "a.jpg,cat,1", "b.jpg,cat,0", "b.jpg,dog,1", "a.jpg,dog,1")
    _, out, _ = command(main, ["merge", sheet, file], capfd)
    assert "4 answers: 3 new, 1 were there, 0 conflicts, 0 without a cell" in out[1]
    assert sheet.read_bytes() == b"image,dog,cat\r\na.jpg,1.00,1\r\nb.jpg,1,0\r\n"


def test_a_merge_goes_where_a_link_points_and_keeps_the_rights(tmp_path, capfd):
    sheet = tmp_path / "real.csv"
    sheet.write_text("image,dog\na.jpg,\n")
    sheet.chmod(0o600)
    (tmp_path / "link.csv").symlink_to("real.csv")
    file = answers(tmp_path, "a.jpg,dog,1")
    assert command(main, ["merge", tmp_path / "link.csv", file], capfd)[0] == 0
    assert (tmp_path / "link.csv").is_symlink() and sheet.read_text() == "image,dog\na.jpg,1\n"
    assert sheet.stat().st_mode & 0o777 == 0o600


def test_names_in_another_unicode_normal_form_are_merged(tmp_path, capfd):
    (tmp_path / "x.csv").write_text("image,hünd\ngröße.jpg,\n", encoding="utf-8")
    file = answers(tmp_path, "gro\u0308ße.jpg,hu\u0308nd,1")
    assert command(main, ["merge", tmp_path / "x.csv", file], capfd)[0] == 0
    assert (tmp_path / "x.csv").read_text(encoding="utf-8") == "image,hünd\ngröße.jpg,1\n"


def test_names_that_begin_with_a_quotation_mark_are_merged(tmp_path, capfd):
    sheet = 'image,"""old"" dog"\n"""a"".jpg",\n'
    (tmp_path / "x.csv").write_text(sheet)
    file = answers(tmp_path, '"""a"".jpg","""old"" dog",1')
    assert command(main, ["merge", tmp_path / "x.csv", file], capfd)[0] == 0
    assert (tmp_path / "x.csv").read_text() == sheet[:-1] + "1\n"


def test_a_new_sheet_that_could_not_be_read_is_not_written(tmp_path, capfd):
    bad = lambda *words: one_line(main, ["new-sheet", tmp_path, "--categories", words[0]], capfd,
                                  *words[1:])
    (tmp_path / "notes.txt").write_text("no image")
    bad("dog", "names in --categories; got 0 images and 1 names")
    Image.new("RGB", (8, 8)).save(tmp_path / "a.jpg")
    bad("dog,Dog", "dog is listed twice")
    bad(" ,", "--categories")
    assert not (tmp_path / "labels.csv").exists()
    assert command(main, ["new-sheet", tmp_path, "--categories", "dog"], capfd)[0] == 0


def exported(tmp_path, image, *annotations):
    """Label Studio's JSON of one task, each annotation a list of choices."""
    notes = [{"result": [{"type": "choices", "value": {"choices": chosen}}]}
             for chosen in annotations]
    (tmp_path / "t.json").write_text(json.dumps([{"data": {"image": image}, "annotations": notes}]))
    return tmp_path / "t.json", "--unlisted", "absent"


def test_uploads_of_label_studio_find_their_photo(tmp_path, capfd):
    (tmp_path / "x.csv").write_text("image,dog,cat\na-b.jpg,,\n")
    words = exported(tmp_path, "/data/upload/3/cb044c20-a-b.jpg", ["cat"])
    assert command(main, ["merge", tmp_path / "x.csv", *words], capfd)[0] == 0
    assert (tmp_path / "x.csv").read_text() == "image,dog,cat\na-b.jpg,0,1\n"


def test_two_people_who_disagree_in_label_studio_are_a_conflict(tmp_path, capfd):
    (tmp_path / "x.csv").write_text("image,dog,cat\na.jpg,,\n")
    words = exported(tmp_path, "/data/local-files/?d=a.jpg", ["cat"], ["dog"])
    _, out, _ = command(main, ["merge", tmp_path / "x.csv", *words], capfd)
    assert "4 answers: 2 new, 0 were there, 2 conflicts" in out[1]


def test_json_min_of_label_studio_is_named(tmp_path, capfd):
    (tmp_path / "x.csv").write_text("image,dog\na.jpg,\n")
    (tmp_path / "t.json").write_text('[{"image": "a.jpg", "choice": "dog"}]')
    one_line(main, ["merge", tmp_path / "x.csv", tmp_path / "t.json", "--unlisted", "absent"],
             capfd, "not JSON-MIN")


def test_a_merge_that_cannot_be_is_refused(tmp_path, capfd):
    (tmp_path / "x.csv").write_text("image,dog\na.jpg,\n")
    bad = lambda file, *words: one_line(main, ["merge", tmp_path / "x.csv", file], capfd, *words)
    bad(answers(tmp_path, "a.jpg,1", head="image,label"), "no column category")
    bad(answers(tmp_path, "a.jpg,dog,maybe"), "answers.csv:2", "maybe")
    bad(answers(tmp_path, "z.jpg,dog,1"), "none of its 1 answers")
    bad(tmp_path / "none.csv", "none.csv")
    (tmp_path / "t.json").write_text('[{"id": 1}]')
    bad(tmp_path / "t.json", "--unlisted")
    assert (tmp_path / "x.csv").read_text() == "image,dog\na.jpg,\n"
    assert not list(tmp_path.glob("*.bak"))


def test_a_new_sheet_lists_the_images_and_is_not_written_twice(tmp_path, capfd):
    (tmp_path / "sub").mkdir()
    for name in (" c.png", "b.jpg", "-a.png", "sub/größe.webp"):
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("no image")
    status, out, _ = command(main, ["new-sheet", tmp_path, "--categories", "dog, cat,Hünd"], capfd)
    assert status == 0 and "4 images, 3 categories" in out[0] and "1 files were left out" in out[1]
    raw = (tmp_path / "labels.csv").read_bytes()
    rows = ("\ufeffimage,dog,cat,Hünd", "./ c.png,,,", "./-a.png,,,", "b.jpg,,,",
            "sub/größe.webp,,,", "")
    assert raw.decode("utf-8") == "\n".join(rows)
    found = data.complete(Config(data=str(tmp_path / "labels.csv")))["train"].paths
    assert [Path(path).name for path in found] == [" c.png", "-a.png", "b.jpg", "größe.webp"]
    one_line(main, ["new-sheet", tmp_path, "--categories", "a"], capfd, "is there already")


@posix
def test_a_new_sheet_leaves_out_names_that_it_cannot_hold(tmp_path, capfd):
    for name in (b"a.jpg", b"b\\c.jpg", b"d\xe9.jpg", b"e.jpg "):
        Image.new("RGB", (8, 8)).save(open(os.path.join(os.fsencode(tmp_path), name), "wb"), "PNG")
    status, out, _ = command(main, ["new-sheet", tmp_path, "--categories", "dog"], capfd)
    assert status == 0 and "1 images" in out[0] and "3 files were left out" in out[1]
    assert out[1].count("(a sheet cannot hold its name: rename it)") == 3
    assert len(data.complete(Config(data=str(tmp_path / "labels.csv")))["train"].paths) == 1


def test_a_new_sheet_says_why_a_photo_is_no_row(tmp_path, capfd, monkeypatch):
    """Raw photos open as a thumbnail, which no later command takes; HEIC needs a package."""
    Image.new("RGB", (8, 8)).save(tmp_path / "DSC.NEF", "TIFF", tiffinfo={254: 1})
    (tmp_path / "IMG.HEIC").write_bytes(b"\0\0\0\x18ftypheic")
    monkeypatch.setattr(Image, "registered_extensions", lambda: {".png": "PNG"})
    one_line(main, ["new-sheet", tmp_path, "--categories", "dog"], capfd, "got 0 images and 1 name",
             "2 files were left out", "DSC.NEF (its first picture is a thumbnail",
             "pip install pillow-heif")
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    status, out, _ = command(main, ["new-sheet", tmp_path, "--categories", "dog"], capfd)
    assert status == 0 and "1 images" in out[0] and "pip install pillow-heif" in out[1]


def test_label_studio_gets_tasks_and_its_answers_come_back(tmp_path, capfd):
    (tmp_path / "s.csv").write_text("image,category,label,probability,kind\n"
                                    "in/a b.jpg,dog,1,0.9,present\n"
                                    "in/a b.jpg,cat,,0.5,uncertain\n"
                                    "in/c.jpg,cat,0,0.1,absent\n")
    status, out, _ = command(main, ["export", tmp_path / "s.csv", tmp_path / "t.json"], capfd)
    tasks = json.loads((tmp_path / "t.json").read_text())
    assert status == 0 and '<Choice value="cat"/><Choice value="dog"/>' in out[-1]
    results = [task["predictions"][0]["result"][0] for task in tasks]
    assert [result["value"]["choices"] for result in results] == [["dog"], []]
    # as it exports them; the second is left open
    for task, chosen in zip(tasks, (["dog", "cat"], None)):
        del task["predictions"]
        task["annotations"] = [] if chosen is None else [
            {"was_cancelled": False, "result": [{"type": "choices", "value": {"choices": chosen}}]}]
    (tmp_path / "export.json").write_text(json.dumps(tasks))
    (tmp_path / "x.csv").write_text("image,dog,cat,cow\nin/c.jpg,,,\nin/a b.jpg,,,\n")
    arguments = ["merge", tmp_path / "x.csv", tmp_path / "export.json", "--unlisted", "absent"]
    assert command(main, arguments, capfd)[0] == 0
    # nobody could choose cow: no cell was suggested
    assert (tmp_path / "x.csv").read_text() == "image,dog,cat,cow\nin/c.jpg,,,\nin/a b.jpg,1,1,\n"


def test_label_studio_finds_photos_below_its_document_root(tmp_path, capfd):
    (tmp_path / "s.csv").write_text("image,category,label\n./-a b.jpg,dog,1\n")
    words = ["export", tmp_path / "s.csv", tmp_path / "t.json", "--folder", "my photos/2024"]
    assert command(main, words, capfd)[0] == 0
    data = json.loads((tmp_path / "t.json").read_text())[0]["data"]
    assert data["image"] == "/data/local-files/?d=my%20photos/2024/-a%20b.jpg"


@pytest.mark.parametrize("address", [
    "/data/local-files/?d=photos/in/a.jpg", "/data/local-files/?d=photos%5Cin%5Ca.jpg",
    "/data/upload/1/0f3a9c21-a.jpg"])
@pytest.mark.parametrize("name", ["in\\a.jpg", ".\\in\\a.jpg", "in/a.jpg"])
def test_names_of_windows_go_through_label_studio(tmp_path, capfd, name, address):
    """A sheet with backslashes is read everywhere else; Label Studio on Windows sends them."""
    after, _ = merged(tmp_path, capfd, f"image,dog\n{name},\n", task(address, [choices("dog")]))
    assert after == f"image,dog\n{name},1\n"
    (tmp_path / "s.csv").write_text(f"image,category,label\n{name},dog,1\n")
    words = ["export", tmp_path / "s.csv", tmp_path / "tasks.json", "--folder", "photos"]
    assert command(main, words, capfd)[0] == 0
    data = json.loads((tmp_path / "tasks.json").read_text())[0]["data"]
    assert data["image"] == "/data/local-files/?d=photos/in/a.jpg"


def task(image, *annotations, **more):
    """A task of an export. An annotation: its results, or its fields in a dict."""
    notes = [note if isinstance(note, dict) else {"result": note} for note in annotations]
    return {"id": 1, "data": {"image": image}, "annotations": notes, "drafts": [],
            "predictions": [{"result": [choices("cow")]}], "file_upload": None} | more


def choices(*names, kind="choices", **more):
    return {"id": "x", "from_name": "category", "to_name": "image", "type": kind,
            "origin": "manual", "value": {kind: list(names)} | more}


def merged(tmp_path, capfd, sheet, *tasks, unlisted="absent"):
    """The sheet after a merge, and what was printed."""
    (tmp_path / "x.csv").write_text(sheet)
    (tmp_path / "t.json").write_text(json.dumps(tasks))
    status, out, err = command(main, ["merge", tmp_path / "x.csv", tmp_path / "t.json",
                                      "--unlisted", unlisted], capfd)
    return (tmp_path / "x.csv").read_text(), "\n".join(out + err)


def test_a_column_that_is_no_category_gets_no_answer(tmp_path, capfd):
    """What was not chosen went as 0 into notes and ages, and the sheet was refused from then on."""
    sheet = "image,dog,age,notes\na.jpg,,3,nice\nb.jpg,,,\n"
    found, _ = merged(tmp_path, capfd, sheet, task("b.jpg", [choices("dog")]))
    assert found == sheet.replace("b.jpg,,,", "b.jpg,1,,")
    sheet = "image,dog,\na.jpg,maybe,\nb.jpg,1,\nc.jpg,,\n"  # Excel's empty column, and a slip
    found, _ = merged(tmp_path, capfd, sheet, task("c.jpg", []))
    assert found == sheet.replace("c.jpg,", "c.jpg,0")
    sheet = "image,labels\na.jpg,dog|cat\nb.jpg,\n"
    found, said = merged(tmp_path, capfd, sheet, task("b.jpg", [choices("labels")]))
    assert found == sheet and "one column of lists takes none" in said


def test_a_choice_in_capitals_is_the_sheets_category(tmp_path, capfd):
    """It had no cell, and the annotator's yes became a no."""
    found, said = merged(tmp_path, capfd, "image,dog,hünd\n./a.jpg,,\n",
                         task("a.jpg", [choices("Dog", "Hu\u0308nd")]))
    assert found == "image,dog,hünd\n./a.jpg,1,1\n" and "0 conflicts, 0 without" in said


@pytest.mark.parametrize("end", ("\n", "\r\n", "\r"))
def test_a_merge_keeps_line_ends_and_what_stands_in_quotes(tmp_path, capfd, end):
    """Unquoted, the \\r of an old program's cell would begin another row."""
    text = end.join(("image,dog,note", 'a.jpg,{},"two\rlines"', "b.jpg,1,x", ""))
    (tmp_path / "x.csv").write_bytes(text.format("").encode())
    file = answers(tmp_path, "./a.jpg,dog,1")
    assert command(main, ["merge", tmp_path / "x.csv", file], capfd)[0] == 0
    assert (tmp_path / "x.csv").read_bytes() == text.format("1").encode()


def test_a_merge_asks_what_minus_one_means(tmp_path, capfd):
    """As absent it makes a 0 unknown: an answer 0 would be none."""
    (tmp_path / "x.csv").write_text("image,dog\na.jpg,-1\nb.jpg,\n")
    arguments = ["merge", tmp_path / "x.csv", answers(tmp_path, "b.jpg,dog,0")]
    one_line(main, arguments, capfd, "--minus-one absent")
    assert command(main, [*arguments, "--minus-one", "absent"], capfd)[0] == 0
    assert (tmp_path / "x.csv").read_text() == "image,dog\na.jpg,-1\nb.jpg,-1\n"


@pytest.mark.parametrize("address, row", [
    ("/data/local-files/?d=a%20b%C3%BC.jpg", "a bü.jpg"),
    ("/data/local-files/?d=photos/a%20b%C3%BC.jpg", "a bü.jpg"),  # the root is a folder above
    ("http://localhost:8080/data/local-files/?d=photos/in/c.jpg", "in/c.jpg"),
    ("/data/local-files/?d=photos/c.jpg", "c.jpg"),
    ("/data/local-files/?d=photos/a%20bu%CC%88.jpg", "a bü.jpg"),  # as macOS writes an umlaut
    ("/data/local-files/?d=photos/-d.jpg", "./-d.jpg"),
    ("/data/upload/1/0f3a9c21-a_b%C3%BC.jpg", "a bü.jpg"),  # uploaded: Django's valid name
    ("/data/upload/12/0f3a9c21-e_1.jpg", "deep/e (1).jpg"),
    ("s3://bucket/photos/in/c.jpg", "in/c.jpg"),
    ("https://host/photos/c.jpg", "c.jpg"),
    ("https://host/photos/c.jpg?signature=a/b.jpg", "c.jpg"),
    ("/data/local-files/?d=other/f.jpg", None),
    ("/data/upload/1/0f3a9c21-f.jpg", None),
])
def test_label_studio_addresses(tmp_path, capfd, address, row):
    rows = ["a bü.jpg", "in/c.jpg", "c.jpg", "./-d.jpg", "deep/e (1).jpg", "g.jpg"]
    sheet = "image,dog\n" + "".join(f"{name},\n" for name in rows)
    after, out = merged(tmp_path, capfd, sheet, task("/data/upload/1/0f3a9c21-g.jpg", []),
                        task(address, [choices("dog")]))
    sheet = sheet.replace("g.jpg,\n", "g.jpg,0\n")
    assert after == (sheet.replace(f"\n{row},\n", f"\n{row},1\n") if row else sheet)
    assert ("1 without a cell" in out) == (row is None)


@pytest.mark.parametrize("tasks, says", [
    ([task("/data/upload/1/0f3a9c21-a.jpg", [])], ("x/a.jpg", "y/a.jpg")),
    ([task("/data/local-files/?d=p/x/a.jpg", []), task("/data/local-files/?d=q/x/a.jpg", [])],
     ("p/x/a.jpg", "q/x/a.jpg", "two tasks")),
    ([task("/data/local-files/?d=x/a.jpg", []), task("/data/local-files/?d=2019/y/a.jpg", [])],
     ("2019/", "one folder")),
    ([{"image": "x/a.jpg", "category": "dog", "annotation_id": 1}], ("JSON-MIN",)),
    ([{"data": {"photo": "x/a.jpg"}, "annotations": []}], ("image",)),
    ([{"data": {"image": "x/a.jpg"}, "completions": []}], ("annotations",)),
    (["x/a.jpg"], ("JSON",)),
    # a camera gives the same names again: what is known of 2019 went to the photos of 2020
    ([task("/data/local-files/?d=2020/x/a.jpg", []), task("/data/local-files/?d=2019/y/a.jpg", [])],
     ("2019/", "2020/", "one folder")),
])
def test_what_label_studio_cannot_tell_is_refused_in_one_line(tmp_path, capfd, tasks, says):
    sheet = "image,dog\nx/a.jpg,\ny/a.jpg,\n"
    (tmp_path / "x.csv").write_text(sheet)
    (tmp_path / "t.json").write_text(json.dumps(tasks))
    words = ["merge", tmp_path / "x.csv", tmp_path / "t.json", "--unlisted", "absent"]
    one_line(main, words, capfd, *says)
    assert (tmp_path / "x.csv").read_text() == sheet


def test_label_studio_annotators_who_disagree_are_a_conflict(tmp_path, capfd):
    sheet = "image,dog,cat\na.jpg,,\nb.jpg,,\n"
    first, second = [choices("dog")], [choices("dog", "cat")]
    after, out = merged(tmp_path, capfd, sheet, task("a.jpg", first, second), task(
        "b.jpg", first, {"result": second, "ground_truth": True, "was_cancelled": False}))
    assert after == "image,dog,cat\na.jpg,1,0\nb.jpg,1,1\n"  # the first, or the ground truth
    assert "2 conflicts" in out and "a.jpg, cat: sheet 0, answer 1" in out


def test_skipped_tasks_and_predictions_of_label_studio_are_no_answers(tmp_path, capfd):
    sheet = "image,dog,cow\na.jpg,,\nb.jpg,,\nc.jpg,,\n"
    after, _ = merged(
        tmp_path, capfd, sheet, task("a.jpg", {"result": [choices("cow")], "was_cancelled": True}),
        task("b.jpg", drafts=[{"result": [choices("cow")]}]), task("c.jpg", [choices("dog")]))
    assert after == "image,dog,cow\na.jpg,,\nb.jpg,,\nc.jpg,1,0\n"


def test_categories_in_other_results_of_label_studio(tmp_path, capfd):
    """Boxes, taxonomies and nested choices name categories too; stars and arrows none."""
    sheet = "image,dog,cat,cow,animal\n" + "".join(f"{i}.jpg,,,,\n" for i in range(5))
    box = choices("dog", kind="rectanglelabels", x=1, y=2, width=3, height=4)
    stars = {"type": "rating", "from_name": "quality", "to_name": "image", "value": {"rating": 3}}
    arrow = {"type": "relation", "from_id": "x", "to_id": "y", "direction": "right"}
    path = ["living", "animal", "cat"]
    after, out = merged(
        tmp_path, capfd, sheet, task("0.jpg", [box, stars, arrow, choices("cow")]),
        task("1.jpg", [choices(path, kind="taxonomy")]), task("2.jpg", [choices(path)]),
        task("3.jpg", [stars]), task("4.jpg", [choices("blurred", kind="choices")]))
    assert after == ("image,dog,cat,cow,animal\n0.jpg,1,0,1,0\n1.jpg,0,1,0,1\n2.jpg,0,1,0,1\n"
                     "3.jpg,0,0,0,0\n4.jpg,0,0,0,0\n")
    assert "1 without a cell" in out and "4.jpg, blurred" in out


# ---- the page

NAMES = ("=a,b.jpg", "größe.jpg", "<script>alert(1)</script>.jpg")


@pytest.fixture
def page(tmp_path):
    """12 cells: two categories, three kinds, two photos each."""
    buffer = io.BytesIO()
    Image.new("RGB", (40, 30), "teal").save(buffer, "JPEG")
    photos = {i: base64.b64encode(buffer.getvalue()).decode() for i in range(3)}
    cells = [{"photo": i, "image": NAMES[i], "category": category, "kind": kind, "probability": 0.5,
              "region": [0, 255, 0, 60]} for kind in ("present", "uncertain", "absent")
             for category in ("</script>dog", "cat") for i in (0, 1)]
    write_page(tmp_path / "out.html", "x.csv", cells, photos, (2, 2), "then merge SHEET ANSWERS")
    return tmp_path / "out.html"


def saved(browser, folder):
    browser.click("#save")
    file = folder / "out-answers.csv"
    for _ in range(100):
        if file.is_file():
            break
        time.sleep(0.1)
    raw = file.read_bytes()
    file.unlink()
    assert raw.startswith(b"\xef\xbb\xbf")
    return list(csv.DictReader(io.StringIO(raw.decode("utf-8-sig"))))


@needs_browser
def test_keys_answer_undo_and_survive_a_closed_tab(page, tmp_path, capfd):
    count = "return document.getElementById('count').textContent"
    with Browser(profile=tmp_path / "profile", downloads=tmp_path) as browser:
        browser.open(page)
        heads = "return [...document.querySelectorAll('h2')].map(h => h.firstChild.textContent)"
        assert browser.run(heads) == ["</script>dog"] * 3 + ["cat"] * 3
        assert browser.run("return [...document.images].every(i => i.complete && i.naturalWidth)")
        # dog: present right and wrong, uncertain skipped, then taken back
        browser.keys("rwsr" + "u")
        assert browser.run(count) == "3 of 12"
        time.sleep(1)
        errors = browser.errors()
    with Browser(profile=tmp_path / "profile", downloads=tmp_path) as browser:
        browser.open(page)
        assert browser.run(count) == "3 of 12"
        browser.keys("w")
        browser.keys("a")  # both likely absent dogs are absent
        assert browser.run(count) == "6 of 12"
        browser.keys("u")
        assert browser.run(count) == "4 of 12"
        browser.keys("a")
        browser.run("scrollTo(0, 0)")
        # an answer is changed by a click
        browser.click("article:nth-of-type(1) .row button:nth-child(2)")
        rows = saved(browser, tmp_path)
        told = browser.run("return document.getElementById('told').textContent")
        assert "5 answers saved as out-answers.csv" in told and "SHEET out-answers.csv" in told
        browser.keys("rrrrrr")
        told = browser.run("return document.getElementById('told').textContent")
        assert "All are answered" in told
        assert errors + browser.errors() == []
    dog = "</script>dog"
    assert rows == [{"image": image, "category": dog, "label": "0"} for image in
                    ("'=a,b.jpg", "größe.jpg", "größe.jpg", "'=a,b.jpg", "größe.jpg")]
    (tmp_path / "x.csv").write_text('image,</script>dog,cat\n"=a,b.jpg",,\n', encoding="utf-8")
    file = answers(tmp_path, *(",".join(f'"{cell}"' for cell in row.values()) for row in rows[:1]))
    assert command(main, ["merge", tmp_path / "x.csv", file], capfd)[0] == 0
    assert (tmp_path / "x.csv").read_text() == 'image,</script>dog,cat\n"=a,b.jpg",0,\n'


@needs_browser
@pytest.mark.parametrize("size", ((390, 844), (1280, 900)))
def test_the_page_fits_its_window(page, size):
    with Browser(size) as browser:
        browser.open(page)
        assert browser.run("return document.documentElement.scrollWidth") <= size[0]
        assert browser.errors() == []


@needs_browser
def test_space_presses_the_button_that_has_the_focus(page):
    with Browser() as browser:
        browser.open(page)
        plain = lambda: browser.run("return document.body.classList.contains('plain')")
        browser.keys(" ")
        assert plain()
        browser.run("document.querySelectorAll('.row button')[7].focus()")  # the third cell's
        browser.keys(" ")
        assert browser.run("return document.getElementById('count').textContent") == "1 of 12"
        assert plain()
        browser.click("article .row button")  # by hand, and then the key of the regions
        browser.keys(" ")
        assert browser.run("return document.getElementById('count').textContent") == "2 of 12"
        assert not plain() and browser.errors() == []


def test_a_new_sheet_of_a_category_with_a_comma(tmp_path, capfd):
    Image.new("RGB", (4, 3)).save(tmp_path / "a.png")
    assert command(main, ["new-sheet", tmp_path, "--categories", 'dog, "red, small car"'],
                   capfd)[0] == 0
    assert data.complete(Config(data=str(tmp_path / "labels.csv")))["train"].names == [
        "dog", "red, small car"]
