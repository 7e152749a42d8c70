import csv
import dataclasses
import os
import struct
import zlib
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from medprune.data import records as records_module
from medprune.data.pictures import find_duplicates, open_image
from medprune.data.published import classify_dermnet, dermnet_slug
from medprune.data.questions import load_conditions
from medprune.data.record import Record
from medprune.data.records import USES, class_counts, describe_images, load_images, sample_balanced, split_records
from medprune.runs.checkup import _data
from medprune.settings import DATA

CONDITIONS = load_conditions()
SHARED = Path(__file__).parents[2] / "shared"
LISTING = SHARED / "dermnet" / "train_listing.csv"
PHOTOS = SHARED / "real_photos"


def picture(seed: int, size=(64, 48)) -> Image.Image:
    """Draw a smooth random picture, so that its perceptual hash is its own and survives re-encoding."""
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)


def save(path: Path, image: Image.Image, **options) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **options)
    return str(path)


def empty_file(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()


def records_of(spec: dict[str, int], **fields) -> list[Record]:
    """Make records without files: {condition: count}."""
    return [Record(f"{c}/{i}", f"{c}/{i}", c, **fields) for c, k in spec.items() for i in range(k)]


def load(source, conditions=CONDITIONS, **options):
    return load_images(source, conditions, **options)


def split_without_files(records, *args, near=(), **kwargs):
    """Split records that have no files, with groups of keys that look alike."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(records_module, "find_duplicates", lambda records: ([], near))
        return split_records(records, *args, **kwargs)


NAIL, SCABIES = "Nail Fungus and other Nail Disease", "Scabies Lyme Disease and other Infestations and Bites"
ECZEMA, ACNE = "Eczema Photos", "Acne and Rosacea Photos"
PSORIASIS = "Psoriasis pictures Lichen Planus and related diseases"
ACTINIC = "Actinic Keratosis Basal Cell Carcinoma and other Malignant Lesions"
BENIGN = "Seborrheic Keratoses and other Benign Tumors"
MELANOMA = "Melanoma Skin Cancer Nevi and Moles"


@pytest.mark.parametrize(
    ("directory", "name", "condition"),
    [
        (ACNE, "rosacea-70.jpg", "rosacea"),
        (ACNE, "07RosaceaK0216.jpg", "rosacea"),
        (ACNE, "07RosaceaFulFAce.jpg", "rosacea"),
        (ACNE, "07rhnophymas032105.jpg", "rosacea"),
        (ACNE, "07SteroidRosGlab.jpg", "rosacea"),
        (ACNE, "07sebDerem110105.jpg", "dermatitis"),
        (PSORIASIS, "Lichen-Planus-Oral-5.jpg", "lichen planus"),
        (PSORIASIS, "08lichenPlanusTongue112205.jpg", "lichen planus"),
        (PSORIASIS, "08SebDErmPresternal.jpg", "dermatitis"),
        (PSORIASIS, "seborrhoeic-dermatitis-3.jpg", "dermatitis"),
        (PSORIASIS, "08psoriasisIntertrig020606.jpg", "psoriasis"),
        (PSORIASIS, "Psoriasis-Light-Sensative-8.jpg", "psoriasis"),
        (PSORIASIS, "pustular-psoriasis-2.jpg", "psoriasis"),
        ("Atopic Dermatitis Photos", "AtopicIMG001-GP3.jpg", "dermatitis"),
        ("Poison Ivy Photos and other Contact Dermatitis", "shoe-allergy-2.jpg", "dermatitis"),
        (ECZEMA, "03ChronicStaisis1.jpg", "dermatitis"),
        (ECZEMA, "pompholyx-4.jpg", "dermatitis"),
        (ECZEMA, "exzema-hand-4.jpg", "dermatitis"),
        (MELANOMA, "lentigo-maligna-9.jpg", "melanoma"),
        (MELANOMA, "malignant-melanoma-9.jpg", "melanoma"),
        (MELANOMA, "amelanotic-melanoma-9.jpg", "melanoma"),
        (ACTINIC, "actinic-keratosis-horn-9.jpg", "actinic keratosis"),
        (ACTINIC, "basal-cell-carcinoma-lid-9.jpg", "basal cell carcinoma"),
        (BENIGN, "seborrheic-keratoses-ruff-9.jpg", "seborrheic keratosis"),
        (BENIGN, "seborrhoeic-keratosis-irritated-9.jpg", "seborrheic keratosis"),
    ],
)
def test_classify_dermnet_reads_styles_and_misspellings(directory, name, condition):
    assert classify_dermnet(directory, name, CONDITIONS) == (condition, "kept")


@pytest.mark.parametrize(
    ("directory", "name", "why"),
    [
        (BENIGN, "chondrodermatitis-nodularis-4.jpg", "ends in dermatitis"),
        ("Systemic Disease", "acrodermatitis-enteropathica-1.jpg", "ends in dermatitis"),
        (ECZEMA, "neurodermatitis-1.jpg", "ends in dermatitis"),
        ("Bullous Disease Photos", "dermatitis-herpetiformis-12.jpg", "another disease named dermatitis"),
        ("Vasculitis Photos", "interstitial-granulomatous-dermatitis-3.jpg", "another disease named dermatitis"),
        (ECZEMA, "factitial-dermatitis-3.jpg", "another disease named dermatitis"),
        ("Lupus and other Connective Tissue diseases", "dermatomyositis-3.jpg", "another disease"),
        (BENIGN, "dermatofibroma-3.jpg", "another disease"),
        (ACNE, "perioral-dermatitis-7.jpg", "perioral dermatitis"),
        (ACNE, "07PerioralDermEye.jpg", "perioral dermatitis"),
        (SCABIES, "caterpillar-dermatitis-1.jpg", "an animal"),
        ("Cellulitis", "staphylococal-diaper-dermatitis-1.jpg", "an infection"),
        ("Warts Molluscum and other Viral Infections", "eczema-herpeticum-1.jpg", "an infection"),
        ("Light Diseases and Disorders of Pigmentation", "berloque-dermatitis-1.jpg", "another group"),
        (BENIGN, "melanoma-mimic-2.jpg", "melanoma mimic"),
        (MELANOMA, "lentigo-simplex-2.jpg", "another disease"),
        (MELANOMA, "atypical-nevi-dermoscopy-2.jpg", "another disease"),
        (MELANOMA, "malignant-melanoma-dermoscopy-2.jpg", "dermoscopy"),
        (ACTINIC, "arsenical-keratoses-2.jpg", "arsenical"),
        (ACTINIC, "basal-cell-nevus-syndrome-2.jpg", "nevus syndrome"),
        (ACTINIC, "actinic-cheilitis-sq-cell-lip-2.jpg", "actinic cheilitis"),
        (ACTINIC, "basal-cell-carcinoma-histology-2.jpg", "histology"),
        (ACTINIC, "actinic-keratosis-5FU-2.jpg", "treatment"),
        (BENIGN, "stucco-keratoses-2.jpg", "another disease"),
        (PSORIASIS, "lichen-planopilaris-2.jpg", "another disease"),
        (PSORIASIS, "lichen-sclerosus-skin-2.jpg", "another disease"),
        (PSORIASIS, "parapsoriasis-2.jpg", "parapsoriasis"),
        (PSORIASIS, "08SebKerm0811.jpg", "seborrheic dermatitis or as seborrheic keratosis"),
        (PSORIASIS, "08SebDermRosacea110104.jpg", "two diagnoses"),
        (PSORIASIS, "Psoriasis-nails-2.jpg", "nail"),
        (NAIL, "psoriasis-2.jpg", "nail"),
        (NAIL, "lichen-planus-2.jpg", "nail"),
        ("Atopic Dermatitis Photos", "4th1IMG006.jpg", "no diagnosis"),
        ("Atopic Dermatitis Photos", "26-0002.jpg", "no diagnosis"),
        ("Atopic Dermatitis Photos", "05keratosisPilaris0609.jpg", "another disease"),
    ],
)
def test_classify_dermnet_avoids_traps_and_says_why(directory, name, why):
    condition, reason = classify_dermnet(directory, name, CONDITIONS)
    assert condition is None and why in reason


@pytest.mark.skipif(not LISTING.exists(), reason="the DermNet file listing is not beside the repository")
def test_dermnet_listing_counts(tmp_path):
    with LISTING.open() as file:
        listed = list(csv.DictReader(file))
    for row in listed:
        empty_file(tmp_path / row["split"] / row["class_dir"] / row["file_name"])
    records, report = load(tmp_path, check=False)
    assert Counter(r.condition for r in records) == {
        "rosacea": 204,
        "actinic keratosis": 168,
        "basal cell carcinoma": 412,
        "dermatitis": 1429,
        "melanoma": 124,
        "psoriasis": 628,
        "lichen planus": 208,
        "seborrheic keratosis": 311,
    }
    assert len(records) + len(report) == len(listed) == 15557
    keys = [r.key for r in records] + report["key"].tolist()
    assert len(set(keys)) == len(keys) and all(key.startswith("train/") for key in keys)
    assert not any("Nail Fungus" in r.key or "istology" in r.key for r in records)
    table = class_counts(records, report)
    assert table.loc["rosacea", ["train", "test", "total"]].tolist() == [204, 0, 204]
    assert table.loc["nail picture", "total"] == 264 and not table.loc["nail picture", "kept"]
    assert table["total"].sum() == 15557

    split, notes = split_without_files(records, 1737, 39, seed=3)
    sizes = {side: Counter(r.condition for r in split[side]) for side in split}
    assert (len(split["train"]), len(split["test"])) == (1737, 39) and set(sizes["test"].values()) == {4, 5}
    assert sizes["train"]["melanoma"] == 119  # all that the test leaves; the larger ones are levelled
    assert max(sizes["train"].values()) - sizes["train"]["psoriasis"] <= 1
    assert not {r.key for r in split["train"]} & {r.key for r in split["test"]}
    assert "Only the train split is given" in notes.notes[0]


@pytest.mark.skipif(not LISTING.exists(), reason="the DermNet file listing is not beside the repository")
def test_the_table_of_slugs_is_what_the_rules_say():
    """data/dermnet_slugs.csv shows, line by line, what is taken for a condition and what is left out and why."""
    found = Counter()
    with LISTING.open() as file:
        for row in csv.DictReader(file):
            condition, why = classify_dermnet(row["class_dir"], row["file_name"], CONDITIONS)
            found[condition or "", why.split(": ")[0], row["class_dir"], dermnet_slug(row["file_name"])] += 1
    with (DATA / "dermnet_slugs.csv").open() as file:
        columns = ("condition", "reason", "directory", "slug")
        table = {tuple(r[column] for column in columns): int(r["images"]) for r in csv.DictReader(file)}
    assert table == {k: n for k, n in found.items() if k[1] != "another disease"}


def test_same_name_in_two_directories_and_splits_gives_distinct_keys(tmp_path):
    for directory in (f"train/{ECZEMA}", "train/Atopic Dermatitis Photos", f"test/{ECZEMA}"):
        empty_file(tmp_path / directory / "03DermatitisLids.jpg")
    records, report = load(tmp_path, check=False)
    assert sorted(r.key.split("/")[0] for r in records) == ["test", "train", "train"]
    assert len({r.key for r in records}) == 3 and {r.split for r in records} == {"train", "test"} and report.empty


def test_other_conditions_than_the_papers_come_from_their_facts(tmp_path):
    facts = {"vitiligo": CONDITIONS["rosacea"] | {"aliases": ["leukoderma"]}}
    for name in ("vitiligo-3.jpg", "Leukoderma-Face-1.jpg", "melasma-1.jpg"):
        empty_file(tmp_path / "train" / "Light Diseases and Disorders of Pigmentation" / name)
    empty_file(tmp_path / "train" / ACNE / "rosacea-1.jpg")
    records, report = load(tmp_path, facts, check=False)
    assert [r.condition for r in records] == ["vitiligo"] * 2 and len(report) == 2


def test_directory_per_condition_ignores_case_plural_and_separators(tmp_path):
    names = ["Seborrheic_Keratoses", "basal-cell carcinomas", "ECZEMA", "lichen.planus", "MEL"]
    for i, name in enumerate(names):
        save(tmp_path / name / f"{i}.PNG", picture(i))
    save(tmp_path / "vitiligo" / "a.png", picture(9))
    (tmp_path / "ECZEMA" / "notes.txt").write_text("x")
    (tmp_path / "ECZEMA" / ".DS_Store").write_text("x")
    records, report = load(str(tmp_path))
    assert {r.key.split("/")[0]: r.condition for r in records} == dict(
        zip(
            names,
            ["seborrheic keratosis", "basal cell carcinoma", "dermatitis", "lichen planus", "melanoma"],
            strict=True,
        )
    )
    assert dict(report.values) == {
        "vitiligo/a.png": "directory names no condition: vitiligo",
        "ECZEMA/notes.txt": "not an image file: notes.txt",
    }
    assert Record(**dataclasses.asdict(records[0])) == records[0]


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_table_with_patients_skin_types_and_splits(tmp_path, suffix):
    for i in range(4):
        save(tmp_path / "photos" / f"{i}.png", picture(i))
    rows = [
        ("photos/0.png", "BCC", 7, 3, "train"),
        ("photos/1.png", "Melanomas", None, None, None),
        ("photos/2.png", "melanoma", 8, 1, "TEST"),
        ("photos/2.png", "rosacea", 8, 1, "test"),
        ("photos/3.png", "vitiligo", 8, 1, "test"),
        ("photos/9.png", "rosacea", 8, 1, "test"),
    ]
    frame = pd.DataFrame(rows, columns=["path", "condition", "patient", "skin_type", "split"])
    source = tmp_path / f"images{suffix}"
    frame.to_csv(source, index=False) if suffix == ".csv" else frame.to_parquet(source)
    records, report = load(source)
    assert [(r.condition, r.split) for r in records] == [("basal cell carcinoma", "train"), ("melanoma", None)]
    assert (records[0].group, records[0].skin_tone, records[1].group) == ("7", "III", None)
    reasons = [reason.split(": ")[0] for reason in report["reason"]]
    assert reasons == ["listed under two conditions"] * 2 + ["not among the conditions", "no such file"]


def test_table_errors_name_what_is_wrong(tmp_path):
    table = tmp_path / "t.csv"
    for text, message in (
        ("path,label\na.png,rosacea\n", "lacks the column 'condition' .* it has 'path', 'label'"),
        ("path:condition\na.png:rosacea\n", "lacks the column 'condition' .* it has 'path:condition'"),
        ("path,condition,modality\na.png,rosacea,photo\n", "'photo' of 'a.png' must be clinical, dermoscopic"),
        ("path,condition,split\na.png,rosacea,validation\n", "'validation' of 'a.png'"),
        ("", "cannot be read as a table: [^\n]*$"),
        ("path,condition\na,b\na,b,c,d\n", "cannot be read as a table: [^\n]*$"),
        ("path,condition,patient\na.png,melanoma,Doe, Jane\n", "line 2: its 4 cells are more than the first line's 3"),
        ('path,condition,note\na,b,"5 mm\nc,d,\ne,f,"6 mm\n', "cannot be read as a table: [^\n]*$"),
    ):
        table.write_text(text)
        with pytest.raises(ValueError, match=message):
            load(table)
    (tmp_path / "t.parquet").write_bytes(b"not parquet")
    with pytest.raises(ValueError, match="cannot be read as a table"):
        load(tmp_path / "t.parquet")


@pytest.mark.parametrize(
    "text",
    [
        "Path, Condition ,Split\nä.png, melanoma ,Train \n",
        "path,condition,split\nä.png,melanoma,train,\n",
        "Path;Condition;Split\nä.png;melanoma;train\n",
        "path\tcondition\tsplit\r\nä.png\tmelanoma\ttrain\r\n",
        '"path"|"condition"|"split"\nä.png|melanoma|train\n',
    ],
    ids=["capitals and spaces", "a comma too many in each line", "semicolons", "tabs", "bars"],
)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "latin-1", "utf-16", "utf-16-le", "utf-16-be"])
def test_table_as_people_write_them(tmp_path, text, encoding):
    save(tmp_path / "ä.png", picture(0))
    (tmp_path / "t.csv").write_bytes(text.encode(encoding))
    (record,), report = load(tmp_path / "t.csv")
    assert (record.key, record.condition, record.split) == ("train/ä.png", "melanoma", "train") and report.empty


def test_names_without_their_suffix_are_found(tmp_path):
    save(tmp_path / "0012.jpg", picture(0))
    (tmp_path / "0034").write_bytes((tmp_path / "0012.jpg").read_bytes())
    (tmp_path / "t.csv").write_text("path,condition\n0012,melanoma\n0034,melanoma\n12,melanoma\n")
    records, report = load(tmp_path / "t.csv")
    assert [Path(r.path).name for r in records] == ["0012.jpg", "0034"] and report["key"].tolist() == ["12"]


def test_names_of_another_case_of_suffix_or_composition_are_found(tmp_path):
    for i, name in enumerate(("1.JPG", "2.jpg", "La\u0308sion.png", "4.jpg", "4.png")):
        save(tmp_path / "photos" / name, picture(i))
    given = ["1", "2.JPG", "L\u00e4sion.png", "4.JPEG", "3.jpg", "x" * 300 + "/5.jpg"]
    (tmp_path / "t.csv").write_text("path,condition\n" + "".join(f"photos/{name},melanoma\n" for name in given))
    records, report = load(tmp_path / "t.csv")
    assert [Path(r.path).name for r in records] == ["1.JPG", "2.jpg", "La\u0308sion.png"]
    assert report["key"].tolist() == [f"photos/{name}" for name in given[3:]]  # of the fourth there are two


def test_table_of_unknown_patients_and_skin_types(tmp_path):
    values = ["-1", "", "unknown", "nan", "Unknown ", "-1.0", "3.0", "007", "IV"]
    for i in range(len(values)):
        save(tmp_path / f"{i}.png", picture(i))
    rows = [f"{i}.png,melanoma,{value},{value}\n" for i, value in enumerate(values)]
    (tmp_path / "t.csv").write_text("path,condition,patient,skin_type\n" + "".join(rows))
    frame = pd.read_csv(tmp_path / "t.csv", dtype=str, keep_default_na=False)
    frame.to_parquet(tmp_path / "t.parquet")
    for name in ("t.csv", "t.parquet"):
        records, _ = load(tmp_path / name)
        assert [r.group for r in records] == [None] * 6 + ["3", "007", "IV"]
        assert [r.skin_tone for r in records] == [None] * 6 + ["III", "007", "IV"]


@pytest.mark.parametrize(
    ("columns", "group", "tone"),
    [
        ("patient,skin_type", "7", "III"),
        ("Patient ID,Fitzpatrick Skin Type", "7", "III"),
        ("PATIENT_ID,fitspatrick", "7", "III"),
        ("subject,Skin Type", "7", "III"),
        ("Subject-ID,FST", "7", "III"),
        ("lesion_id,skin tone", "7", "III"),
        ("case,fitzpatrick_scale", "7", "III"),
        ("doctor,tone", None, None),
    ],
)
def test_patients_and_skin_types_are_found_however_their_columns_are_spelt(tmp_path, columns, group, tone):
    save(tmp_path / "a.png", picture(0))
    (tmp_path / "t.csv").write_text(f"path,condition,{columns}\na.png,melanoma,7,3\n")
    (record,), _ = load(tmp_path / "t.csv")
    assert (record.group, record.skin_tone) == (group, tone)
    lines, _ = describe_images(tmp_path / "t.csv", CONDITIONS)
    assert ("columns not read: doctor, tone" in lines) == (group is None)
    said, good = _data(SimpleNamespace(images=str(tmp_path / "t.csv"), conditions=None, modality=None))
    assert good and ("0 left out; columns not read: doctor, tone\n" in said) == (group is None)


def test_a_lesion_counts_where_no_patient_is_known(tmp_path):
    for i in range(2):
        save(tmp_path / f"{i}.png", picture(i))
    (tmp_path / "t.csv").write_text("path,condition,lesion_id,patient_id\n0.png,melanoma,L1,P1\n1.png,melanoma,L2,\n")
    assert [r.group for r in load(tmp_path / "t.csv")[0]] == ["P1", "L2"]


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        ("path,condition,patient,subject_id", "two columns for the patient, 'patient' and 'subject_id'"),
        ("path,condition,skin_type,fitspatrick", "two columns for the skin_type, 'skin_type' and 'fitspatrick'"),
        ("path,condition,condition,note", "two columns for the condition"),
        ("path,condition,patient,Patient", "two columns are named 'patient'"),
    ],
)
def test_two_columns_that_say_the_same_are_refused(tmp_path, columns, words):
    save(tmp_path / "a.png", picture(0))
    (tmp_path / "t.csv").write_text(f"{columns}\na.png,melanoma,melanoma,1\n")
    with pytest.raises(ValueError, match=words):
        load(tmp_path / "t.csv")


def test_one_condition_under_two_spellings_is_listed_twice(tmp_path):
    save(tmp_path / "a.png", picture(0))
    (tmp_path / "t.csv").write_text("path,condition\na.png,BCC\n./a.png,basal cell carcinoma\n")
    records, report = load(tmp_path / "t.csv")
    assert [r.key for r in records] == ["a.png"] and report.values.tolist() == [["./a.png", "listed twice: ./a.png"]]


def test_windows_paths_are_found_by_their_last_parts_or_named(tmp_path):
    save(tmp_path / "images" / "a.png", picture(0))
    save(tmp_path / "b.png", picture(1))
    given = ["images\\a.png", "D:\\data\\b.png", "C:/data/images/c.png"]
    (tmp_path / "t.csv").write_text("path,condition\n" + "".join(f"{path},melanoma\n" for path in given))
    records, report = load(tmp_path / "t.csv")
    assert [Path(r.path).relative_to(tmp_path).as_posix() for r in records] == ["images/a.png", "b.png"]
    assert report.reason.tolist() == [f"no such file (a Windows path): {tmp_path}/C:/data/images/c.png"]
    (tmp_path / "t.csv").write_text("path,condition\n/kaggle/input/x/images/a.png,melanoma\nother/b.png,melanoma\n")
    records, report = load(tmp_path / "t.csv")
    assert [Path(r.path) for r in records] == [tmp_path / "images" / "a.png"]
    assert report.reason.tolist() == [f"no such file: {tmp_path}/other/b.png"]  # b.png here may be another picture


def test_what_is_left_out_is_named_in_the_sentence(tmp_path):
    table = tmp_path / "t.csv"
    for text, message in (
        (
            "m.png,nv\nn.png,nv\no.png,bkl\np.png,melanoma\n",
            "4 .* often as 'not among the conditions', such as nv, bkl",
        ),
        ("m.png,melanoma\n", f"'no such file', such as {tmp_path}/m.png"),
    ):
        table.write_text("path,condition\n" + text)
        with pytest.raises(ValueError, match=message):
            load(table)
    for name in ("akiec", "vasc"):
        save(tmp_path / "folders" / name / "a.png", picture(0))
    with pytest.raises(ValueError, match="2 .* often as 'directory names no condition', such as akiec, vasc"):
        load(tmp_path / "folders")


def test_the_folder_where_one_stands_is_read(tmp_path, monkeypatch):
    save(tmp_path / "train" / ACNE / "rosacea-70.jpg", picture(0))
    monkeypatch.chdir(tmp_path / "train")
    (tmp_path / "train" / "notes").mkdir()
    assert [r.condition for r in load(tmp_path / "train")[0]] == [r.condition for r in load(".")[0]] == ["rosacea"]


def test_hidden_folders_are_not_read(tmp_path):
    for name in (
        "Melanoma/a.png",
        "Melanoma/.ipynb_checkpoints/b.png",
        "Melanoma/new/.thumbnails/c.png",
        ".melanoma/d.png",
    ):
        save(tmp_path / name, picture(0))
    records, report = load(tmp_path)
    assert [r.key for r in records] == ["Melanoma/a.png"] and report.empty


def test_links_are_followed_but_not_in_circles(tmp_path):
    save(tmp_path / "elsewhere" / "deep" / "a.png", picture(0))
    source = tmp_path / "photos"
    source.mkdir()
    (source / "melanoma").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "up").symlink_to(tmp_path / "elsewhere")
    assert [r.key for r in load(source)[0]] == ["melanoma/deep/a.png"]


def test_links_to_nothing_and_pipes_are_left_out_or_passed_over(tmp_path):
    save(tmp_path / "melanoma" / "a.png", picture(0))
    for name in ("metadata.csv", "notes", "melanoma/b.png"):
        (tmp_path / name).symlink_to(tmp_path / "nowhere")
    for name in ("pipe", "pipe.csv", "melanoma/pipe.png"):
        os.mkfifo(tmp_path / name)
    records, report = load(tmp_path)
    assert [r.key for r in records] == ["melanoma/a.png"]
    reasons = dict(report.values)
    for name in ("b.png", "pipe.png"):
        assert reasons[f"melanoma/{name}"] == f"no such file: {tmp_path}/melanoma/{name}"


@pytest.mark.parametrize("name", ["val", "valid", "Validation", "Melanoma"])
def test_what_lies_beside_train_and_test_is_reported(tmp_path, name):
    for i, home in enumerate(("Train", "test", name)):
        save(tmp_path / home / "Melanoma" / f"{i}.png", picture(i))
    records, report = load(tmp_path)
    assert [r.key for r in records] == ["train/Melanoma/0.png", "test/Melanoma/1.png"]
    assert report.values.tolist() == [[f"{name}/Melanoma/2.png", f"beside train and test: {name}"]]
    assert class_counts(records, report).loc["beside train and test", "unassigned"] == 1


def test_names_that_are_not_utf8_are_left_out_by_name(tmp_path):
    save(tmp_path / "good" / "melanoma" / "a.png", picture(0))
    for name in (b"L\xe4sion.png", b"L\xe4sion.txt"):
        (tmp_path / "good" / "melanoma" / os.fsdecode(name)).write_bytes(
            (tmp_path / "good/melanoma/a.png").read_bytes()
        )
    records, report = load(tmp_path / "good")
    assert [r.key for r in records] == ["melanoma/a.png"] and len(report) == 2
    reasons = dict(report.values)
    assert reasons[r"melanoma/L\xe4sion.png"] == rf"name is not UTF-8: {tmp_path}/good/melanoma/L\xe4sion.png"
    report.to_csv(tmp_path / "report.csv")
    (tmp_path / "good").rename(tmp_path / os.fsdecode(b"b\xe4d"))
    with pytest.raises(ValueError, match=r"b\\xe4d holds no usable image .* often as 'name is not UTF-8'") as caught:
        load(tmp_path / os.fsdecode(b"b\xe4d"))
    str(caught.value).encode()


def test_kaggle_mounts_a_data_set_in_either_place(tmp_path, monkeypatch):
    monkeypatch.setattr(records_module, "KAGGLE", tmp_path, raising=False)
    with pytest.raises(
        ValueError, match=f"{tmp_path}/dermnet is neither .* no {tmp_path}/datasets/./dermnet; expected"
    ):
        load(tmp_path / "dermnet")
    save(tmp_path / "datasets" / "someone" / "dermnet" / "train" / ACNE / "rosacea-1.jpg", picture(0))
    assert [r.condition for r in load(tmp_path / "dermnet")[0]] == ["rosacea"]
    (tmp_path / "datasets" / "someone" / "dermnet").rename(tmp_path / "dermnet")
    assert [r.condition for r in load(tmp_path / "datasets" / "someone" / "dermnet")[0]] == ["rosacea"]
    with pytest.raises(ValueError, match=f"and there is no {tmp_path}/other; expected"):
        load(tmp_path / "datasets" / "someone" / "other")


@pytest.mark.parametrize("content", ["nothing", "other directory", "broken image"])
def test_source_without_a_usable_image_is_refused_with_the_layouts(tmp_path, content):
    source = tmp_path / "photos"
    source.mkdir()
    if content == "other directory":
        save(source / "cats" / "a.png", picture(0))
    if content == "broken image":
        empty_file(source / "rosacea" / "a.jpg")
    with pytest.raises(ValueError, match=r"photos holds no usable image .*DermNet directory.*<condition>.*CSV"):
        load(source)
    with pytest.raises(ValueError, match="neither a folder nor"):
        load(source / "absent")


@pytest.mark.parametrize(
    ("mode", "colour", "seen"),
    [
        ("1", 1, 255),
        ("L", 100, 100),
        ("P", 3, None),
        ("CMYK", (0, 0, 0, 155), 100),
        ("LA", (100, 0), 255),  # transparent: shows the white below
        ("RGBA", (100, 100, 100, 255), 100),
        ("I;16", 100 * 257, 100),
        ("I", 100 * 257, 100),
        ("F", 100 / 255, 100),
    ],
)
def test_open_image_takes_any_mode(tmp_path, mode, colour, seen):
    path = save(tmp_path / f"a.{'png' if mode not in ('CMYK', 'I', 'F') else 'tif'}", Image.new(mode, (40, 30), colour))
    image = open_image(path)
    assert (image.mode, image.size) == ("RGB", (40, 30))
    assert seen is None or np.abs(np.asarray(image, dtype=int) - seen).max() <= 1


def write_png_of_16_bits(path: Path, values: np.ndarray) -> Path:
    """Write values (height, width, 3), which Pillow cannot."""
    lines = b"".join(b"\0" + line.astype(">u2").tobytes() for line in values)
    header = struct.pack(">IIBBBBB", *values.shape[1::-1], 16, 2, 0, 0, 0)
    parts = [(b"IHDR", header), (b"IDAT", zlib.compress(lines)), (b"IEND", b"")]
    chunks = (struct.pack(">I", len(d)) + t + d + struct.pack(">I", zlib.crc32(t + d)) for t, d in parts)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(chunks))
    return path


@pytest.mark.parametrize("bits", [8, 10, 12, 14, 16])
def test_pictures_of_fewer_bits_than_their_file_has_are_not_dark(tmp_path, bits):
    grey = np.linspace(0, 2**bits - 1, 40 * 30).reshape(30, 40)
    files = [save(tmp_path / "a.png", Image.fromarray(grey.astype(np.uint16)))]
    files.append(save(tmp_path / "a.tif", Image.fromarray(grey.astype(np.int32))))
    if bits > 8:  # Pillow drops the low 8 of 16 bits in colour
        files.append(write_png_of_16_bits(tmp_path / "b.png", np.stack([grey] * 3, -1)))
    for file in files:
        seen = np.asarray(open_image(file), dtype=float)[..., 0]
        assert seen.min() == 0 and seen.max() == 255 and 120 < seen.mean() < 136, (file, seen.mean())


def test_a_float_picture_with_few_values_above_its_white_is_not_black(tmp_path):
    values = np.full((30, 40), 0.5, dtype=np.float32)
    values[3, 4:9] = 1.5
    seen = np.asarray(open_image(save(tmp_path / "a.tif", Image.fromarray(values))))
    assert np.median(seen) == 128 and seen.max() == 255


def test_open_image_applies_orientation_and_limits_size(tmp_path):
    image = Image.new("RGB", (400, 200), "blue")
    image.paste("red", (0, 0, 200, 200))  # the left half; orientation 6 turns it clockwise, to the top
    exif = Image.Exif()
    exif[0x0112] = 6
    opened = open_image(save(tmp_path / "a.jpg", image, exif=exif), max_side=100)
    assert opened.size == (50, 100)
    assert opened.getpixel((25, 10))[0] > 200 > opened.getpixel((25, 90))[0]


def test_open_image_takes_12000_pixels_without_decoding_them_all(tmp_path):
    path = save(tmp_path / "a.jpg", Image.new("L", (12000, 9000), 90), quality=20)
    assert open_image(path).size == (1024, 768)


def test_bad_images_are_skipped_and_listed_by_name(tmp_path):
    folder = tmp_path / "rosacea"
    save(folder / "good.jpg", picture(0, (200, 200)))
    whole = (folder / "good.jpg").read_bytes()
    (folder / "truncated.jpg").write_bytes(whole[: len(whole) // 2])
    png = Path(save(folder / "truncated.png", picture(1, (200, 200)))).read_bytes()
    (folder / "truncated.png").write_bytes(png[: len(png) // 2])
    (folder / "text.jpg").write_text("<html>not found</html>")
    save(folder / "dot.png", Image.new("RGB", (1, 1)))
    save(folder / "sliver.png", Image.new("RGB", (2000, 20)))
    empty_file(folder / "empty.png")
    records, report = load(tmp_path)
    assert [r.key for r in records] == ["rosacea/good.jpg"]
    assert sorted(Path(key).name for key in report["key"]) == [
        "dot.png",
        "empty.png",
        "sliver.png",
        "text.jpg",
        "truncated.jpg",
        "truncated.png",
    ]
    assert all(Path(row.key).name in row.reason for row in report.itertuples())
    assert "1 x 1 pixels" in report.set_index("key").loc["rosacea/dot.png", "reason"]
    with pytest.raises(ValueError, match="truncated.jpg cannot be read"):
        open_image(folder / "truncated.jpg")


@pytest.fixture
def with_duplicates(tmp_path) -> list[Record]:
    """Eight pictures each of two conditions; a copy and a small JPEG of 0, and a mislabelled twin of 1."""
    spec = [("rosacea", i, picture(i, (200, 150))) for i in range(8)]
    spec += [("melanoma", i, picture(i, (200, 150))) for i in range(10, 18)]
    spec += [("rosacea", 100, picture(0, (200, 150))), ("melanoma", 101, picture(1, (200, 150)))]
    records = [
        Record(f"{c}/{i}.png", save(tmp_path / c / f"{i}.png", image), c, "test" if i % 4 == 0 else "train")
        for c, i, image in spec
    ]
    small = save(tmp_path / "rosacea" / "small.jpg", picture(0, (200, 150)).resize((100, 75)), quality=60)
    return [*records, Record("rosacea/small.jpg", small, "rosacea", "train")]


def test_find_duplicates_exact_and_near(with_duplicates):
    twins = ["melanoma/101.png", "rosacea/1.png"]
    exact, near = (sorted(map(sorted, groups)) for groups in find_duplicates(with_duplicates))
    assert exact == [twins, ["rosacea/0.png", "rosacea/100.png"]]
    assert near == [twins, ["rosacea/0.png", "rosacea/100.png", "rosacea/small.jpg"]]


def test_split_keeps_duplicates_on_one_side_and_drops_conflicts(with_duplicates):
    split, report = split_records(with_duplicates, seed=1)
    train, test = ({r.key for r in split[side]} for side in ("train", "test"))
    assert "rosacea/0.png" in test and "rosacea/small.jpg" in test  # a tie of one each goes to the test
    assert report.dropped == {
        "rosacea/100.png": "same file as rosacea/0.png",
        "rosacea/1.png": "same file under melanoma and rosacea",
        "melanoma/101.png": "same file under melanoma and rosacea",
    }
    given = {r.key: r.split for r in with_duplicates}
    assert {key for key in test if given[key] == "train"} == {"rosacea/small.jpg"}
    assert all(given[key] == "train" for key in train) and len(train | test) == len(with_duplicates) - 3
    assert not find_duplicates([*split["train"], *split["test"]])[0]


@pytest.mark.parametrize("seed", range(5))
def test_split_by_patient_is_disjoint_seeded_and_balanced(seed):
    rng = np.random.default_rng(seed)
    records = [
        Record(f"{c}/{i}", "", c, group=f"patient {rng.integers(25)}")
        for c, k in {"a": 30, "b": 20, "c": 9}.items()
        for i in range(k)
    ]
    split, report = split_without_files(records, n_test=9, seed=seed)
    patients = [{r.group for r in split[side]} for side in ("train", "test")]
    assert not patients[0] & patients[1] and Counter(r.condition for r in split["test"]) == {"a": 3, "b": 3, "c": 3}
    assert len(split["train"]) >= 36  # few are lost with the test's patients
    assert split == split_without_files(records[::-1], n_test=9, seed=seed)[0]
    assert split != split_without_files(records, n_test=9, seed=seed + 50)[0]


def test_split_of_few_photographs_tests_every_condition_that_can_be_trained_on():
    records = records_of({"a": 14, "b": 8, "c": 4, "d": 2, "e": 1})
    for seed in range(5):
        split, report = split_without_files(records, seed=seed)
        test = Counter(r.condition for r in split["test"])
        assert test["a"] in (4, 5) and test["b"] in (2, 3) and test["c"] in (1, 2) and test["d"] == 1 and not test["e"]
        assert {r.condition for r in split["train"]} == set("abcde") and len(split["train"]) == 29 - len(split["test"])
        assert report.notes == ("No test image shows e: all are of one patient or picture.",)
        split, report = split_without_files(records, n_train=100, n_test=10, seed=seed)
        assert Counter(r.condition for r in split["test"]) == {"a": 4, "b": 3, "c": 2, "d": 1}
        assert report.notes[0] == "100 train images were asked for; 19 can be given."
    split, report = split_without_files(records_of({"a": 2, "b": 9}), n_test=9)
    assert Counter(r.condition for r in split["test"])["a"] == 1 and len(split["test"]) <= 6
    assert report.notes[0].startswith("9 test images were asked for")


def test_a_condition_of_one_patient_is_trained_on():
    records = records_of({"a": 9, "b": 9}) + records_of({"c": 6}, group="p1")
    for seed in range(5):
        split, report = split_without_files(records, seed=seed)
        assert [sum(r.condition == "c" for r in split[side]) for side in ("train", "test")] == [6, 0]
        assert report.notes == ("No test image shows c: all are of one patient or picture.",)


@pytest.mark.parametrize("seed", range(5))
def test_the_test_takes_patients_of_few_images_and_loses_none_for_training(seed):
    many = records_of({"a": 20}, group="many")
    records = many + [dataclasses.replace(r, key=f"one/{i}") for i, r in enumerate(records_of({"a": 9}))]
    split, _ = split_without_files(records, n_test=3, seed=seed)
    assert len(split["train"]) == 26 and {r.group for r in split["test"]} == {None}


def test_a_condition_bound_to_all_images_of_another_leaves_a_test():
    records = records_of({"a": 6, "b": 1})
    tied = [["b/0", "a/0"], ["a/0", "a/1"], ["a/1", "a/2"], ["a/2", "a/3"]]
    split, report = split_without_files(records, n_test=3, near=tied)
    assert {r.key for r in split["test"]} <= {"a/4", "a/5"} and "No test image shows b:" in report.notes[-1]


def test_splits_that_cannot_be_run_are_refused_by_name():
    given = records_of({"a": 3, "b": 3}, split="train")
    tested = [dataclasses.replace(r, key=f"test/{r.key}", split="test") for r in records_of({"a": 2, "c": 2})]
    with pytest.raises(ValueError, match="'c' has 2 test images and none to train on: given splits"):
        split_without_files([*given, *tested])
    records = records_of({"a": 6, "b": 6})
    with pytest.raises(ValueError, match="'b' has 2 test images and none to train on: n_train=1 holds none"):
        split_without_files(records, n_train=1, n_test=4)
    with pytest.raises(ValueError, match="All 12 images are of patient 'p1' and stay together: a test needs another"):
        split_without_files(records_of({"a": 6, "b": 6}, group="p1"))
    with pytest.raises(ValueError, match="No image of a, b is left to test on: a patient's images stay together"):
        split_without_files([Record("x", "x", "b"), *records_of({"a": 1}, group="p1")])
    with pytest.raises(ValueError, match="All 2 images are of one picture and stay together"):
        split_without_files(records_of({"a": 2}), near=[["a/0", "a/1"]])
    with pytest.raises(ValueError, match="No image of a, c is left to train on"):
        split_without_files([*tested, Record("x", "x", "a", "train")], near=[["x", "test/a/0"]])


def test_images_without_a_split_are_trained_on_where_others_have_one():
    records = records_of({"a": 3}, split="train") + [Record("t", "t", "a", "test"), *records_of({"b": 2})]
    split, report = split_without_files(records, n_test=2)
    assert [r.key for r in split["test"]] == ["t"] and len(split["train"]) == 5
    assert report.notes == ("2 test images were asked for; 1 can be given.", "No test image shows b.")


@pytest.mark.skipif(not PHOTOS.exists(), reason="the real photographs are not beside the repository")
def test_real_photographs_split():
    records, report = load(PHOTOS)
    assert len(records) == 28 and report["key"].tolist() == ["ATTRIBUTION.csv"]
    split, notes = split_records(records)
    assert Counter(r.condition for r in split["test"])["melanoma"] == 1 and len(split["test"]) == 10
    assert len(split["train"]) == 18 and notes.notes == () and notes.dropped == {}


def test_split_refuses_keys_that_are_shared():
    with pytest.raises(ValueError, match="8 records share 4 keys"):
        split_without_files(records_of({"a": 4}) * 2)


def test_sample_balanced_is_level_seeded_and_nested():
    records = records_of({"a": 30, "b": 5, "c": 2})
    sample = sample_balanced(records, 15, seed=4)
    assert Counter(r.condition for r in sample) == {"a": 8, "b": 5, "c": 2} and len(set(sample)) == 15
    assert sample_balanced(records[::-1], 6, seed=4) == sample[:6]
    assert sample_balanced(records, 15, seed=5) != sample
    with pytest.raises(ValueError, match="Cannot draw 38 of 37"):
        sample_balanced(records, 38, seed=0)


def test_each_use_has_pictures_of_its_own_while_there_are_enough():
    records = records_of({"a": 30, "b": 12, "c": 9})
    drawn = {use: sample_balanced(records, 9, 4, use) for use in USES}
    assert len({r.key for some in drawn.values() for r in some}) == 27
    for some in drawn.values():
        assert Counter(r.condition for r in some) == {"a": 3, "b": 3, "c": 3}
    assert sample_balanced(records[::-1], 5, 4, USES[1]) == drawn[USES[1]][:5]
    few = records_of({"a": 4})
    assert len(set(sample_balanced(few, 4, 0, USES[2]))) == 4, "a third that is too small is filled up"
    assert sample_balanced(few, 1, 0, USES[2]) != sample_balanced(few, 1, 0, USES[0])
