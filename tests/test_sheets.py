"""Sheets with slips: each ends in one line that names file, line and remedy."""
import csv
import shutil

import pytest

import data
from config import Config
from tools import check
import fake_datasets as fake
from fake_datasets import refused
from small_world import one_line
from support import UserError


HEAD = "image,dog,cat\n"

SHEETS = {
    "empty": ("", "the sheet is empty"),
    "commas only": (",,\n,\n", "the sheet is empty"),
    "header only": (HEAD, "expected a row for each image"),
    "no classes": ("image\n0.jpg\n", ":1: expected a header"),
    "long row": (HEAD + "0.jpg,1,0,1\n", r":2: 4 cells"),
    "bad cell": (HEAD + "0.jpg,1,maybe\n", ":2: cat='maybe': a cell is 1"),
    "minus one": (HEAD + "0.jpg,1,-1\n", ":2: cat='-1': a cell is 1 .*--minus-one"),
    "duplicate image": (
        HEAD + "0.jpg,1,0\n1.jpg,,\n./0.jpg,0,1\n",
        ":4: ./0.jpg is already on line 2",
    ),
    "class twice": ("image,dog,dog\n0.jpg,1,0\n", ":1: the class 'dog' is there twice"),
    "capitals in spite of prompts": (
        "image,Jaguar,jaguar\n#prompt,jaguar car,jaguar animal\n0.jpg,1,0\n",
        ":1: the class 'jaguar' is there twice",
    ),
    "capitals": ("image,dog,Dog\n0.jpg,1,0\n", ":1: the class 'dog' is there twice"),
    "class without a name": (
        "image,dog,,cat\n0.jpg,1,0,0\n",
        ":1: the class '' is there twice, capitals aside, or has no name",
    ),
    "no positive": (
        HEAD + "0.jpg,0,\n1.jpg,,0\n",
        "no positive label is left in 2 training images",
    ),
    "missing image": (HEAD + "0.jpg,1,0\nnone.jpg,1,0\n", ":3: no image 'none.jpg' in .*which"),
    "folder as image": (HEAD + "sub,1,0\n", ":2: no image 'sub' in .*, which --root"),
    "leaves the folder": (HEAD + "../0.jpg,1,0\n", ":2: the file name '../0.jpg' leads out"),
    "no labels": (HEAD + "".join(f"{i}.jpg,0.7,a\n" for i in range(4)), "a column of labels"),
    "zero byte": (HEAD + "/a\0b.jpg,1,0\n", ":2: "),
    "no image name": (HEAD + "0.jpg,1,0\n,1,0\n", ":3: no image '' in .*, which --root"),
    "open quote": (HEAD + '0.jpg,"1,0\n1.jpg,1,0\n', "not a CSV row"),
    "header of words": ("0.jpg,yes,no\n1.jpg,no,yes\n", ":1: expected a header"),
    "index of pandas": (
        ",image,dog\n" + "".join(f"{i},{i}.jpg,1\n" for i in range(3)),
        "first column .*index=False",
    ),
    "image last": (
        "dog,cat,file\n" + "".join(f"1,0,{i}.jpg\n" for i in range(3)),
        "the first column holds names",
    ),
    "name without its ending": (HEAD + "0,1,0\n", "no image .*with their ending"),
    "underscore for a blank": (
        "image,fire_hydrant,Fire hydrant\n0.jpg,1,0\n",
        ":1: the class 'fire hydrant' is there twice",
    ),
    # a column of lists, or a row a label, beside a column that looks like labels
    **{
        f"labels beside {name}": (
            f"image,{column},{name}\n0.jpg,dog|cat,1\n1.jpg,cat,0\n2.jpg,dog,0\n",
            f"--ignore {column}, or the others .docs/data.md: lists, long",
        )
        for column, name in (("labels", "is_valid"), ("LabelName", "Confidence"), ("tags", "fold"))
    },
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("sheet")
    for i in range(4):
        fake.photo(root / f"{i}.jpg", i)
    fake.photo(root / "größe 1.jpg", 9)
    (root / "sub").mkdir()
    return root


@pytest.mark.parametrize("case", SHEETS)
def test_bad_sheets(folder, case):
    text, match = SHEETS[case]
    fake.write(folder / "s.csv", text)
    assert str(folder / "s.csv") in refused(match, folder / "s.csv")


def test_sheet_encodings_and_shapes(folder):
    path = folder / "s.csv"
    plain = HEAD + "0.jpg,1,0\ngröße 1.jpg,,1\n"
    for text in (
        plain.encode("utf-8-sig"),
        plain.replace("\n", "\r\n").encode(),
        plain.rstrip().encode(),
        plain.replace(",1,0", ', 1 ,"0"').encode(),
        plain.encode("utf-16"),
        plain.replace(",", ";").encode(),
        plain.replace(",", "\t").encode(),
        ("sep=;\n" + plain.replace(",", ";")).encode(),
        plain.replace("\n", ",,\n").encode(),
        plain.replace("1,0", "1.0,0.0").encode(),
        plain.replace("1,0", "True,no").encode(),
        (plain + "\n,,\n").encode(),
        ("sep=;\n" + plain.replace(",", ";")).replace("\n", "\r").encode(),
        ('"sep=;"\n' + plain.replace(",", ";")).encode(),
        ("sep=\t\n" + plain.replace(",", "\t")).encode(),
        ("sep=,,,\r\n" + plain).encode(),
        plain.encode("utf-16-le"),
        plain.replace("1,0", "1.000,0.00").encode(),
        plain.replace(",", ";").replace("1;0", "1,0;0,0").encode(),
        plain.replace("1,0", "Y,n").replace(",,", ",#N/A,").encode(),
        plain.replace(",,", ",<NA>,").encode(),
        plain.replace("ö", "o\u0308").encode(),
    ):
        # a byte-order mark, CRLF, no last newline, blanks, UTF-16, semicolons, tabs, Excel's first
        # line in all its forms, empty columns, floats with commas, words, empty rows, a name in
        # another Unicode normal form: all fine
        path.write_bytes(text)
        train = fake.load(path, val=0.0)[0]
        assert train.names == ["dog", "cat"] and train.labels.tolist() == [[1, -1], [0, 1]]
    path.write_bytes(plain.encode("latin-1"))
    refused(r"s.csv:3: not UTF-8 text", path)
    path.write_bytes(plain.encode().replace(b"0.jpg", b"0.j\0pg"))
    refused("s.csv:2: ", path)
    refused("cannot be read", folder / "none.csv")
    refused("cannot be read", shutil.copytree(folder / "sub", folder / "dir.csv"))


def test_cells_that_excel_leaves_out_at_the_end_are_unknown(folder):
    fake.write(folder / "s.csv", HEAD + "0.jpg,1,0\n1.jpg,1\n2.jpg\n")
    train = fake.load(folder / "s.csv", val=0.0)[0]
    assert train.labels.tolist() == [[1, -1], [1, 0], [0, 0]]


@pytest.mark.parametrize("notes", (("", ""), ("hm", ""), ("hm", "so")))
def test_a_column_that_the_first_sheet_drops_is_none_of_the_second(folder, notes):
    rows = [f"{i}.jpg,{i % 2},nice one" for i in range(3)]
    (folder / "a.csv").write_text("\n".join(["image,dog,notes", *rows]))
    rows = [f"{i}.jpg,1,{note}" for i, note in zip((3, "größe 1"), notes)]
    (folder / "b.csv").write_text("\n".join(["image,dog,notes", *rows]))
    cfg = Config(data=str(folder / "a.csv"), val=str(folder / "b.csv"))
    assert [split.names for split in data.load(cfg)[:2]] == [["dog"], ["dog"]]


@pytest.mark.parametrize("unlisted", (None, "absent"))
def test_a_second_sheet_without_labels_is_none_of_lists(folder, unlisted):
    (folder / "a.csv").write_text("image,dog\n0.jpg,1\n1.jpg,0\n")
    (folder / "b.csv").write_text("image,cat\n3.jpg,\n")
    cfg = Config(data=str(folder / "a.csv"), val=str(folder / "b.csv"), unlisted=unlisted)
    with pytest.raises(UserError, match="its classes differ|a column of labels per category"):
        data.load(cfg)


@pytest.mark.parametrize("text, names", (
    ("image,present\n0.jpg,1\n1.jpg,0\n", ["present"]),
    ('image;"car, red";"car, blue"\n0.jpg;1;0\n1.jpg;0;1\n', ["car, red", "car, blue"])))
def test_headers_that_look_like_labels_or_hold_commas(folder, text, names):
    (folder / "x.csv").write_text(text)
    assert data.complete(Config(data=str(folder / "x.csv")))["train"].names == names


def sheet_of_lists(folder, cells):
    with open(folder / "s.csv", "w", newline="", encoding="utf-8") as handle:
        csv.writer(handle).writerows(
            [["image", "labels"], *([f"{i}.jpg", cell] for i, cell in enumerate(cells))]
        )
    return folder / "s.csv"


@pytest.mark.parametrize("first", ("dog|fire hydrant", "dog;fire hydrant", "dog, fire hydrant"))
def test_lists_as_other_programs_write_them(folder, first, capsys):
    sheet = sheet_of_lists(folder, [first, "dog", "", "dog"])
    train = fake.load(sheet, val=0.0, unlisted="absent")[0]
    assert train.names == ["dog", "fire hydrant"]
    assert train.labels.tolist() == [[1, 1], [1, -1], [-1, -1], [1, -1]]
    assert "2 categories: dog, fire hydrant" in capsys.readouterr().err  # what was understood


@pytest.mark.parametrize(
    "first", ("['dog', 'cat']", '["dog"]', '{"choices":["dog","cat"]}', "('dog',)", "['dog' 'cat']")
)
def test_lists_in_brackets_are_not_taken_for_names(folder, first):
    refused("write a list as dog.cat", sheet_of_lists(folder, [first, "dog", "", "dog"]),
            unlisted="absent")


def test_every_problem_of_a_sheet_is_kept(folder):
    fake.write(folder / "s.csv", HEAD + "0.jpg,1,0,1\n1.jpg,maybe,0\nnone.jpg,1,1\n2.jpg,1,1\n")
    with pytest.raises(UserError) as error:
        fake.load(folder / "s.csv")
    assert [p.split(":")[1] for p in error.value.problems] == [
        "2",
        "3",
        "4",
    ] and "and 2 more" in str(error.value)


def test_second_sheet(folder):
    fake.write(folder / "a.csv", HEAD + "0.jpg,1,0\n1.jpg,0,1\n")
    fake.write(folder / "b.csv", "image,dog,cow\n2.jpg,1,0\n")
    refused(r"b.csv: its classes differ .*\['cat', 'cow'\]", folder / "a.csv", val=folder / "b.csv")
    fake.write(folder / "b.csv", HEAD + "2.jpg,1,0\n1.jpg,1,0\n")
    refused("b.csv: 1 images are in another sheet", folder / "a.csv", val=folder / "b.csv")
    shutil.copy(folder / "1.jpg", folder / "copy.jpg")  # the same picture under another name
    fake.write(folder / "b.csv", HEAD + "2.jpg,1,0\ncopy.jpg,1,0\n")
    refused("b.csv: 1 images are in another .*copy.jpg", folder / "a.csv", test=folder / "b.csv")
    refused("--test needs sheets.*coco and .*b.csv", "coco", folder, test=folder / "b.csv")
    refused("--test needs sheets.*x.txt", folder / "a.csv", test=folder / "x.txt")


@pytest.mark.parametrize("setting", (dict(ignore="dog"), dict(minus_one="absent"),
                                     dict(unlisted="unknown")))
def test_how_a_sheet_is_read_is_not_said_of_other_data(folder, setting, capfd):
    name, value = next(iter(setting.items()))
    option = "--" + name.replace("_", "-")
    refused(f"^{option} is for .csv or .tsv, got coco: drop it", "coco", folder,
            **setting)
    one_line(check.main, ["scenes", option, value], capfd, "is for .csv or .tsv")


def test_columns_of_a_second_sheet_come_in_the_order_of_the_first(folder):
    fake.write(folder / "a.csv", "image,dog,cat,cow\n0.jpg,1,0,0\n")
    fake.write(folder / "b.csv", "image,cow,dog,cat\n1.jpg,1,0,\n")
    train, val, _ = fake.load(folder / "a.csv", val=folder / "b.csv")
    assert val.names == train.names == ["dog", "cat", "cow"]
    assert val.labels.tolist() == val.truth.tolist() == [[-1, 0, 1]]


def test_what_is_not_listed_is_absent_also_where_a_zero_was_written(folder):
    """A merge writes 0s into a sheet of ticks; what is said of empty cells holds in all sheets."""
    fake.write(folder / "a.csv", HEAD + "0.jpg,1,\n1.jpg,0,1\n")
    fake.write(folder / "b.csv", HEAD + "2.jpg,1,\n3.jpg,0,1\n")
    train, val, _ = fake.load(folder / "a.csv", val=folder / "b.csv", unlisted="absent")
    assert train.labels.tolist() == [[1, -1], [-1, 1]]
    assert val.labels.tolist() == [[1, -1], [-1, 1]]


def test_what_is_said_to_be_unknown_is_no_empty_cell(folder):
    """CheXpert: -1 is uncertain, an empty cell is absent. "NA" is how R writes an empty one."""
    fake.write(folder / "a.csv", HEAD + "0.jpg,1,-1\n1.jpg,,1\n2.jpg,?,NA\n")
    train = fake.load(folder / "a.csv", val=0, minus_one="unknown", unlisted="absent")[0]
    assert train.labels.tolist() == [[1, 0], [-1, 1], [0, -1]]
    fake.write(folder / "a.csv", HEAD + "0.jpg,1,-1\n1.jpg,0,1\n2.jpg,,1\n")
    train = fake.load(folder / "a.csv", val=0, minus_one="absent", unlisted="absent")[0]
    assert train.labels.tolist() == [[1, -1], [0, 1], [-1, 1]]
    fake.write(folder / "a.csv", "image,tags\n0.jpg,dog|cat\n1.jpg,?\n2.jpg,\n")
    train = fake.load(folder / "a.csv", val=0, unlisted="absent")[0]
    assert train.labels.tolist() == [[1, 1], [0, 0], [-1, -1]]  # one filled cell: lists, as is said
    fake.write(folder / "a.csv", "image,dog\n0.jpg,\n1.jpg,\n")  # a new sheet is none of lists
    assert data.complete(Config(data=str(folder / "a.csv"), unlisted="unknown"))["train"].names == [
        "dog"]
    fake.write(folder / "a.csv", "image,dog\n0.jpg,1\n1.jpg,0\n")
    fake.write(folder / "b.csv", "image,dog\n2.jpg,\n")
    test = fake.load(folder / "a.csv", val=0, test=folder / "b.csv", unlisted="absent")[2]
    assert test.labels.tolist() == [[-1]]


@pytest.mark.parametrize("head, name", (("image;red, small car", "red, small car"),
                                        ("image\tred, small, shiny car", "red, small, shiny car"),
                                        ("image,dog; brown", "dog; brown")))
def test_what_ends_the_first_cell_ends_all(folder, head, name):
    fake.write(folder / "s.csv", f"{head}\n0.jpg{head[5]}1\n1.jpg{head[5]}0\n")
    assert fake.load(folder / "s.csv", val=0)[0].names == [name]


def test_the_words_of_excel_in_other_languages(folder):
    fake.write(folder / "s.csv", HEAD + "0.jpg,WAHR,FALSCH\n1.jpg,FAUX,VRAI\n2.jpg,ja,nein\n")
    labels = fake.load(folder / "s.csv", val=0)[0].labels
    assert labels.tolist() == [[1, -1], [-1, 1], [1, -1]]
    rows = "".join(f"{i}.jpg,cierto,incierto\n" for i in range(3))
    fake.write(folder / "s.csv", HEAD + rows)
    refused("a column of labels per category: 1 present", folder / "s.csv")


def test_lists_with_words_for_nothing(folder, capsys):
    sheet = sheet_of_lists(folder, ["dog|cat", "dog", "none", "cat"])
    train = fake.load(sheet, val=0.0, unlisted="absent")[0]
    assert train.names == ["cat", "dog"]
    assert train.labels.tolist() == [[1, 1], [-1, 1], [-1, -1], [1, -1]]


def test_a_second_sheet_of_lists_need_not_name_every_category(folder):
    for i in range(6):
        fake.photo(folder / f"t{i}.jpg", 20 + i)
    fake.write(folder / "a.csv", "image,tags\nt0.jpg,dog|cat\nt1.jpg,cat\nt2.jpg,dog\n")
    fake.write(folder / "b.csv", "image,tags\nt3.jpg,dog\nt4.jpg,dog\nt5.jpg,dog\n")
    _, val, _ = fake.load(folder / "a.csv", val=folder / "b.csv", unlisted="absent")
    assert val.names == ["cat", "dog"] and val.labels.tolist() == [[-1, 1]] * 3
    fake.write(folder / "b.csv", "image,tags\nt3.jpg,dog|cow\nt4.jpg,dog\nt5.jpg,dog\n")
    refused(r"b.csv: its classes differ .*\['cow'\]", folder / "a.csv", val=folder / "b.csv",
            unlisted="absent")


def test_what_the_training_sheet_ignores_may_lack_in_the_others(folder):
    fake.write(folder / "a.csv", "image,dog,age,id\n0.jpg,1,33,7\n1.jpg,0,44,8\n")
    fake.write(folder / "b.csv", "image,dog\n2.jpg,1\n")
    train, val, _ = fake.load(folder / "a.csv", val=folder / "b.csv", ignore="age, id")
    assert train.names == val.names == ["dog"]
    refused("a.csv: --ignore names", folder / "a.csv", ignore="dig")


def test_lists_ask_what_they_do_not_name(folder):
    fake.write(folder / "s.csv", "image,tags\n0.jpg,dog|cat\n1.jpg,cat\n2.jpg,dog\n")
    refused("its cells are lists .'dog|cat'.: .* Say --unlisted absent or unknown",
            folder / "s.csv")


def test_what_only_another_sheet_has_can_be_ignored(folder):
    fake.write(folder / "a.csv", "image,dog\n0.jpg,1\n1.jpg,0\n")
    fake.write(folder / "b.csv", "image,people,dog,indoor\n2.jpg,2,1,1\n3.jpg,0,0,1\n")
    split = fake.load(folder / "a.csv", test=folder / "b.csv", ignore="people,indoor")[2]
    assert split.names == ["dog"] and split.labels.tolist() == [[1], [-1]]
    refused("--ignore names .'dig'.", folder / "a.csv", test=folder / "b.csv", ignore="people,dig")


@pytest.mark.parametrize("camera", ("camera", "author name"))
def test_a_column_of_lists_beside_a_column_of_words(folder, camera):
    """In the training sheet and in another: the one that is no list has to be ignored."""
    lists = f"image,tags,{camera}\n0.jpg,dog|cat,A\n1.jpg,cat,B\n2.jpg,dog,A\n"
    fake.write(folder / "a.csv", lists)
    refused("'tags' holds no labels, but may list them: --ignore tags, or the others",
            folder / "a.csv", unlisted="absent")
    train = fake.load(folder / "a.csv", unlisted="absent", ignore=camera, val=0)[0]
    assert train.labels.tolist() == [[1, 1], [1, -1], [-1, 1]]  # cat, dog
    for i in range(3):
        fake.photo(folder / f"u{i}.jpg", 30 + i)
    fake.write(folder / "b.csv", "image,tags\nu0.jpg,dog\nu1.jpg,cat\nu2.jpg,dog\n")
    refused("a.csv: .*'tags' holds no labels", folder / "b.csv", test=folder / "a.csv",
            unlisted="absent")
    fake.load(folder / "b.csv", test=folder / "a.csv", unlisted="absent", ignore=camera)


def test_an_underscore_of_a_column_is_a_blank_of_its_prompt(folder):
    fake.write(folder / "s.csv", "image,red_car\n0.jpg,1\n")
    train = fake.load(folder / "s.csv", val=0)[0]
    assert train.names == ["red_car"] and train.prompts == ["red car"]
    fake.write(folder / "s.csv", "image,red_car,dog\n#prompt,,hound\n0.jpg,1,0\n")
    assert fake.load(folder / "s.csv", val=0)[0].prompts == ["red car", "hound"]


@pytest.mark.parametrize("said, code, zero", (("absent", -1, 0), ("unknown", 0, -1)))
def test_what_minus_one_and_a_name_that_is_not_listed_mean_is_said(folder, said, code, zero):
    """Where -1 is absent, 0 is unknown."""
    fake.write(folder / "s.csv", HEAD + "0.jpg,1,-1\n1.jpg,0,1\n")
    labels = fake.load(folder / "s.csv", minus_one=said, val=0)[0].labels
    assert labels.tolist() == [[1, code], [zero, 1]]
    fake.write(folder / "l.csv", "image,tags\n0.jpg,dog|cat\n1.jpg,cat\n2.jpg,dog\n")
    labels = fake.load(folder / "l.csv", unlisted=said, val=0)[0].labels
    assert labels.tolist() == [[1, 1], [1, code], [code, 1]]  # cat, dog


def test_a_share_that_holds_nothing_out(folder):
    fake.write(folder / "s.csv", HEAD + "0.jpg,1,0\n1.jpg,0,1\n")
    refused("--val 0.2 of 2 training images holds none out", folder / "s.csv", val="0.2")
    # not asked for
    assert fake.load(folder / "s.csv")[1] is fake.load(folder / "s.csv", val=0)[1] is None
    refused("lower --val, or", folder / "s.csv", val=0.9)
    for wrong in ("most", "1", "1e0", "-0.1", "nan"):
        refused(f"--val expects a share .* got {wrong}", folder / "s.csv", val=wrong)
    refused("lower --val, or", folder / "s.csv", val="9e-1")


def test_checker_prints_one_short_line_a_problem(coco, folder, tmp_path, capsys):
    def lines(*arguments):
        assert check.main([*map(str, arguments)]) == 2
        return capsys.readouterr().err.splitlines()

    (line,) = lines("coco", "--root", coco[0], "--no-decode")
    assert "none to learn" in line and " categories are in no" in line and len(line) < 200
    fake.write(folder / "s.csv", HEAD + "0.jpg,1,0\n1.jpg,0,1\n")
    fake.write(folder / "n.txt", "one\n")
    (line,) = lines(folder / "s.csv", "--names", folder / "n.txt")
    assert "n.txt: expected 2 lines" in line
    fake.write(folder / "s.csv", HEAD + '0.jpg,1,0\n"no\nimage.jpg",0,1\n')
    (line,) = lines(folder / "s.csv")
    assert line.startswith("error: ") and "no image.jpg" in line


def test_the_same_picture_under_two_names_is_told(tmp_path, capsys):
    fake.photo(tmp_path / "a.jpg", 0)
    fake.photo(tmp_path / "c.jpg", 1)
    shutil.copy(tmp_path / "a.jpg", tmp_path / "b.jpg")
    fake.write(tmp_path / "s.csv", "image,dog,cat\na.jpg,1,0\nb.jpg,0,1\nc.jpg,1,1\n")
    assert check.main([str(tmp_path / "s.csv")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "b.jpg, " in line and "a.jpg: the same picture, and their labels disagree" in line


def test_a_locale_that_cannot_write_a_file_name_is_one_line(tmp_path, capsys):
    from support.cli import run_main

    assert run_main(lambda: "\u732b.jpg".encode("ascii")) == 2
    assert "PYTHONUTF8=1" in capsys.readouterr().err


def test_a_category_of_ticks_alone_among_others_is_told(folder, capsys):
    """Of all categories it is a way to fill a sheet; of one among others it is an oversight."""
    fake.write(folder / "s.csv", HEAD + "0.jpg,1,1\n1.jpg,,0\n2.jpg,,0\n")
    cfg = Config(data=str(folder / "s.csv"))
    assert not [*check.check(cfg)]
    assert "no 0 for ['dog']: " in capsys.readouterr().err
    for cells in ("0.jpg,1,1\n1.jpg,,\n", "0.jpg,1,1\n1.jpg,0,0\n"):
        fake.write(folder / "s.csv", HEAD + cells)
        assert not [*check.check(cfg)] and "no 0" not in capsys.readouterr().err
    fake.write(folder / "s.csv", HEAD + "0.jpg,1,\n1.jpg,,\n")  # cats come with later photos
    assert [*check.check(cfg)] and "no 0" not in capsys.readouterr().err
