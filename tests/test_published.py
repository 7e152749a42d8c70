"""Published data sets as they are downloaded: each with files made to its layout, and two with their real tables."""

import csv
import json
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from medprune import cli
from medprune.data.published import SETS
from medprune.data.questions import load_conditions, name_index, plain
from medprune.data.record import skin_type
from medprune.data.records import describe_images, gather_images, load_images, save_table, split_records
from medprune.settings import DATA, Settings, seen_by

CONDITIONS = load_conditions()
PHOTOS = Path(__file__).parents[2] / "shared" / "photos"
needs_photos = pytest.mark.skipif(not PHOTOS.exists(), reason="the real photographs are not beside the repository")
BCC, AK, MEL = "basal cell carcinoma", "actinic keratosis", "melanoma"


def draw(folder: Path, *names: str) -> None:
    """Write a picture of its own under each name."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        seed = sum(ord(letter) * (i + 1) for i, letter in enumerate(name))
        coarse = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((64, 48), Image.Resampling.BICUBIC).save(folder / name)


def table(path: Path, header: str, *rows: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join([header, *rows]) + "\n", encoding="utf-8")
    return path


def read(source, conditions=CONDITIONS, **options) -> tuple[dict, dict]:
    """Return ({file name: record}, {file or listed name: reason}) of a source."""
    records, report = load_images(source, conditions, **options)
    return {Path(r.path).name: r for r in records}, {Path(key).name: why for key, why in report.values}


HAM = "lesion_id,image_id,dx,dx_type,age,sex,localization"


@pytest.mark.parametrize("name", ["HAM10000_metadata.csv", "HAM10000_metadata", "HAM10000_metadata.tab"])
def test_ham10000_in_two_folders_by_lesion(tmp_path, name):
    draw(tmp_path, "HAM10000_images_part_1/ISIC_0024306.jpg", "HAM10000_images_part_2/ISIC_0029306.jpg")
    draw(tmp_path, "HAM10000_images_part_2/ISIC_0029307.jpg", "HAM10000_images_part_2/ISIC_0029308.jpg")
    draw(tmp_path, "HAM10000_images_part_1/.ipynb_checkpoints/ISIC_0024306-checkpoint.jpg")
    rows = ["HAM_1,ISIC_0024306,bcc,histo,80.0,male,scalp", "HAM_1,ISIC_0029306,bcc,histo,80.0,male,scalp"]
    rows += ["HAM_2,ISIC_0029307,bkl,histo,,,", "HAM_3,ISIC_0029308,akiec,histo,,,", "HAM_4,ISIC_0029309,mel,histo,,,"]
    lines = [line.replace(",", "\t") if name.endswith("tab") else line for line in (HAM, *rows)]
    table(tmp_path / name, *lines)
    records, left_out = read(tmp_path)
    assert {n: (r.condition, r.group, r.modality, r.skin_tone) for n, r in records.items()} == {
        "ISIC_0024306.jpg": (BCC, "HAM_1", "dermoscopic", None),
        "ISIC_0029306.jpg": (BCC, "HAM_1", "dermoscopic", None),
    }
    assert left_out == {
        "ISIC_0029307.jpg": "not among the conditions: benign keratosis (bkl)",
        "ISIC_0029308.jpg": "not among the conditions: actinic keratosis or Bowen disease (akiec)",
        "ISIC_0029309": "listed, but no such picture: ISIC_0029309",
    }
    chosen = CONDITIONS | {AK: CONDITIONS[AK] | {"aliases": [*CONDITIONS[AK]["aliases"], "akiec"]}}
    assert read(tmp_path, chosen)[0]["ISIC_0029308.jpg"].condition == AK


def test_ham10000_in_two_tables_and_two_copies_of_a_folder_is_read_once(tmp_path):
    for home in ("HAM10000_images_part_1", "ham10000_images_part_1"):
        draw(tmp_path, f"{home}/ISIC_1.jpg", f"{home}/ISIC_2.jpg")
    for name in ("HAM10000_metadata", "HAM10000_metadata.csv"):
        table(tmp_path / name, HAM, "HAM_1,ISIC_1,bcc,,,,", "HAM_2,ISIC_2,mel,,,,")
    one_hot = "image,MEL,NV,BCC,AKIEC,BKL,DF,VASC"
    table(tmp_path / "ISIC2018_Task3_Training_GroundTruth.csv", one_hot, "ISIC_1,0,0,1,0,0,0,0", "ISIC_2,1,0,0,0,0,0,0")
    records, left_out = read(tmp_path)
    assert {r.key: r.group for r in records.values()} == {
        "HAM10000_images_part_1/ISIC_1.jpg": "HAM_1",
        "HAM10000_images_part_1/ISIC_2.jpg": "HAM_2",
    }
    assert Counter(why.split(": ")[0] for why in left_out.values()) == {
        "another file of a listed picture": 2,
        "another table of what HAM10000_metadata lists": 2,
    }


PAD = (
    "patient_id,lesion_id,smoke,drink,background_father,background_mother,age,pesticide,gender,skin_cancer_history,"
    "cancer_history,has_piped_water,has_sewage_system,fitspatrick,region,diameter_1,diameter_2,diagnostic,itch,grew,"
    "hurt,changed,bleed,elevation,img_id,biopsed"
)


def pad_row(image, diagnostic, patient, tone="", region="BACK", said=",,,,,", age="55"):
    return f"{patient},7,,,,,{age},,,,,,,{tone},{region},,,{diagnostic},{said},{image},True"


def test_pad_ufes_20_in_three_folders_with_its_misspelt_column(tmp_path):
    draw(tmp_path, "imgs_part_1/imgs_part_1/PAT_1_2_3.png", "imgs_part_3/PAT_9_9_9.png", "imgs_part_2/PAT_1_2_4.jpg")
    rows = [pad_row("PAT_1_2_3.png", "ACK", "PAT_1", "3.0"), pad_row("PAT_1_2_4.png", "SEK", "PAT_1", "3.0")]
    rows += [pad_row("PAT_5_5_5.png", "MEL", "PAT_5"), pad_row("PAT_9_9_9.png", "NEV", "PAT_9")]
    path = table(tmp_path / "metadata.csv", PAD, *rows)
    for source in (tmp_path, path):
        records, left_out = read(source)
        assert {n: (r.condition, r.group, r.skin_tone, r.modality) for n, r in records.items()} == {
            "PAT_1_2_3.png": (AK, "PAT_1", "III", "clinical"),
            "PAT_1_2_4.jpg": ("seborrheic keratosis", "PAT_1", "III", "clinical"),
        }
        assert left_out == {
            "PAT_5_5_5.png": "listed, but no such picture: PAT_5_5_5.png",
            "PAT_9_9_9.png": "not among the conditions: melanocytic nevus (NEV)",
        }
    pd.read_csv(path).to_parquet(tmp_path / "metadata.parquet")
    assert read(tmp_path / "metadata.parquet")[0] == read(path)[0]


def test_what_patients_say_is_put_in_words_and_a_biopsy_is_not(tmp_path):
    names = ["PAT_1_1_1.png", "PAT_2_2_2.png", "PAT_3_3_3.png"]
    draw(tmp_path, *names)
    rows = [pad_row(names[0], "BCC", "PAT_1", said="True,True,False,UNK,True,False")]
    rows += [pad_row(names[1], "ACK", "PAT_2", region="NOSE", age="60.0")]
    rows += [pad_row(names[2], "SEK", "PAT_3", region="", age="")]
    table(tmp_path / "metadata.csv", PAD, *rows)
    said = {n: r.history for n, r in read(tmp_path)[0].items()}
    assert said == {
        names[0]: "Aged 50 to 59, on the back, flat, itches, does not hurt, has bled, has grown.",
        names[1]: "Aged 60 to 69, on the nose.",
        names[2]: None,
    }
    assert {r.history for r in read(tmp_path, history=False)[0].values()} == {None}
    save_table(list(read(tmp_path)[0].values()), tmp_path / "own.csv")
    assert {n: r.history for n, r in read(tmp_path / "own.csv")[0].items()} == said
    draw(tmp_path / "ham", "ISIC_1.jpg", "ISIC_2.jpg")
    table(tmp_path / "ham" / "HAM10000_metadata.csv", HAM, "H_1,ISIC_1,mel,histo,80.0,male,lower extremity", "H_2,ISIC_2,bcc,,,unknown,scalp")
    assert {n: r.history for n, r in read(tmp_path / "ham")[0].items()} == {
        "ISIC_1.jpg": "Aged 80 to 89, male, on the lower extremity.", "ISIC_2.jpg": "On the scalp.",
    }  # fmt: skip


def test_isic_2019_marks_one_column_and_has_lesions_beside(tmp_path):
    names = ["ISIC_1", "ISIC_2_downsampled", "ISIC_3", "ISIC_4", "ISIC_5", "ISIC_6"]
    draw(tmp_path, *(f"ISIC_2019_Training_Input/{name}.jpg" for name in (names[0], "ISIC_2", *names[2:])))
    marks = ["0,0,0,1.0,0,0,0,0,0", "1.0,0,0,0,0,0,0,0,0", "0,0,0,0,1.0,0,0,0,0", "0,0,0,0,0,0,0,0,0",
             "1.0,0,1.0,0,0,0,0,0,0", "0,0,0,0,0,0,0,1.0,0"]  # fmt: skip
    header = "image,MEL,NV,BCC,AK,BKL,DF,VASC,SCC,UNK"
    rows = [f"{name},{mark}" for name, mark in zip(names, marks, strict=True)]
    table(tmp_path / "ISIC_2019_Training_GroundTruth.csv", header, *rows)
    header = "image,age_approx,anatom_site_general,lesion_id,sex"
    table(tmp_path / "ISIC_2019_Training_Metadata.csv", header, "ISIC_1,55,,BCN_1,male", "ISIC_2_downsampled,55,,,male")
    records, left_out = read(tmp_path)
    assert {n: (r.condition, r.group) for n, r in records.items()} == {
        "ISIC_1.jpg": (AK, "BCN_1"),
        "ISIC_2.jpg": (MEL, None),
    }
    assert left_out == {
        "ISIC_3.jpg": "not among the conditions: benign keratosis (bkl)",
        "ISIC_4.jpg": "not one diagnosis: none is marked",
        "ISIC_5.jpg": "not one diagnosis: mel, bcc",
        "ISIC_6.jpg": "not among the conditions: squamous cell carcinoma (scc)",
    }


def test_isic_2020_by_patient_without_its_listed_duplicates(tmp_path):
    draw(tmp_path, *(f"train/ISIC_{n}.jpg" for n in range(5)))
    header = "image_name,patient_id,sex,age_approx,anatom_site_general_challenge,diagnosis,benign_malignant,target"
    said = ["melanoma", "seborrheic keratosis", "unknown", "melanoma", "nevus"]
    rows = [f"ISIC_{n},IP_{n // 2},male,45,torso,{word},benign,0" for n, word in enumerate(said)]
    table(tmp_path / "ISIC_2020_Training_GroundTruth.csv", header, *rows)
    table(tmp_path / "ISIC_2020_Training_GroundTruth_v2.csv", f"{header},lesion_id", *(f"{row},IL_1" for row in rows))
    table(tmp_path / "ISIC_2020_Training_Duplicates.csv", "image_name_1,image_name_2", "ISIC_0,ISIC_3")
    records, left_out = read(tmp_path)
    assert {n: (r.condition, r.group) for n, r in records.items()} == {
        "ISIC_0.jpg": (MEL, "IP_0"),
        "ISIC_1.jpg": ("seborrheic keratosis", "IP_0"),
    }
    assert left_out["ISIC_3.jpg"] == "the set's own list of duplicates has it: of ISIC_0"
    assert left_out["ISIC_2.jpg"] == "not among the conditions: benign, not named (unknown)"
    assert left_out["ISIC_2020_Training_GroundTruth_v2.csv"].startswith("another table of what ISIC_2020_Training_G")


FITZ = "md5hash,fitzpatrick_scale,fitzpatrick_centaur,label,nine_partition_label,three_partition_label,qc,url,url_alphanum"


def test_fitzpatrick17k_by_hash_without_what_is_wrongly_labelled(tmp_path):
    draw(tmp_path, *(f"images/{name}.jpg" for name in ("0a", "0b", "0c", "0d")))
    rows = ["0a,3,4,superficial spreading melanoma ssm,malignant melanoma,malignant,,u,u", "0b,-1,-1,rhinophyma,x,x,,u,u"]
    rows += ["0c,2,2,psoriasis,x,x,3 Wrongly labelled,u,u", "0d,2,2,neurodermatitis,inflammatory,x,1 Diagnostic,u,u"]
    table(tmp_path / "fitzpatrick17k.csv", FITZ, *rows, "0e,5,5,lichen planus,x,x,,u,u", "0f,5,5,lichen planus,x,x,,u,u")
    records, left_out = read(tmp_path)
    assert {n: (r.condition, r.skin_tone, r.modality) for n, r in records.items()} == {
        "0a.jpg": (MEL, "III", "clinical"),
        "0b.jpg": ("rosacea", None, "clinical"),
    }
    assert left_out["0c.jpg"] == "wrongly labelled, says the set's qc: psoriasis"
    assert left_out["0d.jpg"] == "not among the conditions: lichen simplex (neurodermatitis)"
    assert [left_out[n].split(":")[0] for n in ("0e", "0f")] == ["listed, but no such picture"] * 2


def test_ddi_has_its_skin_tones_in_pairs(tmp_path):
    draw(tmp_path, "000001.png", "000002.png", "000003.png", "000004.png")
    rows = ["0,1,000001.png,12,True,melanoma-in-situ", "1,2,000002.png,34,False,seborrheic-keratosis-irritated"]
    rows += ["2,3,000003.png,56,True,basal-cell-carcinoma-nodular", "3,4,000004.png,56,False,benign-keratosis"]
    table(tmp_path / "ddi_metadata.csv", ",DDI_ID,DDI_file,skin_tone,malignant,disease", *rows)
    records, left_out = read(tmp_path)
    assert {n: (r.condition, r.skin_tone) for n, r in records.items()} == {
        "000001.png": (MEL, "I-II"),
        "000002.png": ("seborrheic keratosis", "III-IV"),
        "000003.png": (BCC, "V-VI"),
    }
    assert left_out == {"000004.png": "not among the conditions: benign keratosis (benign-keratosis)"}


def scin(folder, labels=True):
    draw(folder, *(f"dataset/images/{n}.png" for n in ("-11", "-12", "21", "31", "41")))
    header = "case_id,source,fitzpatrick_skin_type,image_1_path,image_2_path,image_3_path"
    path = "dataset/images/"
    cases = [f"007,SCIN,FST2,{path}-11.png,{path}-12.png,", f"7,SCIN,FST3,{path}21.png,,"]
    cases += [f"8,SCIN,NONE_SELECTED,{path}31.png,,", f"9,SCIN,,{path}41.png,,"]
    cases = table(folder / "dataset" / "scin_cases.csv", header, *cases)
    if labels:
        header = ["case_id", "weighted_skin_condition_label"]
        header += [f"dermatologist_fitzpatrick_skin_type_label_{i}" for i in (1, 2, 3)]
        said = [
            ("007", "{'Eczema': 0.41, 'Allergic Contact Dermatitis': 0.2, 'Psoriasis': 0.39}", "FST4", "FST5", "FST5"),
            ("7", "{'Psoriasis': 0.5, 'Tinea': 0.5}", "", "", ""),
            ("8", "{'SK/ISK': 1.0}", "FST1", "FST2", ""),
            ("9", "", "", "", ""),
        ]
        with (folder / "dataset" / "scin_labels.csv").open("w", newline="") as file:
            csv.writer(file).writerows([header, *said])
    return cases


def test_scin_joins_cases_with_labels_as_texts_and_weighs_them(tmp_path):
    scin(tmp_path)
    records, left_out = read(tmp_path)
    assert {n: (r.condition, r.group, r.skin_tone) for n, r in records.items()} == {
        "-11.png": ("dermatitis", "007", "V"),
        "-12.png": ("dermatitis", "007", "V"),
        "31.png": ("seborrheic keratosis", "8", None),
    }
    assert left_out == {
        "21.png": "dermatologists disagree: Psoriasis, Tinea",
        "41.png": "not among the conditions: none given",
    }


def test_scin_without_its_labels_or_with_a_broken_one_is_one_sentence(tmp_path):
    cases = scin(tmp_path, labels=False)
    with pytest.raises(ValueError, match="scin_cases.csv names no condition: SCIN's scin_labels.csv must lie beside it"):
        load_images(tmp_path, CONDITIONS)
    table(cases.parent / "scin_labels.csv", "case_id,weighted_skin_condition_label", "7,{'Eczema'")
    with pytest.raises(ValueError, match=r"weighted_skin_condition_label \"\{'Eczema'\" is no dict"):
        load_images(cases, CONDITIONS)


def derm7pt(folder):
    draw(folder / "images", "NEL/Nel026.jpg", "NEL/NEL025.jpg", "FAL/Fcl1.jpg", "FAL/Fal1.jpg", "A/x.jpg", "A/y.jpg")
    header = "case_num,diagnosis,seven_point_score,clinic,derm,case_id,notes"
    rows = ["1,basal cell carcinoma,0,NEL/Nel026.jpg,NEL/NEL025.jpg,,", "2,melanoma (in situ),0,FAL/Fcl1.jpg,FAL/Fal1.jpg,,"]
    table(folder / "meta" / "meta.csv", header, *rows, "3,melanoma,0,A/x.jpg,A/y.jpg,,")
    for side, row in (("train", 0), ("test", 1), ("valid", 2)):
        table(folder / "meta" / f"{side}_indexes.csv", "indexes", str(row))
    return folder


@pytest.mark.parametrize("part", ["", "meta/meta.csv"])
def test_derm7pt_has_two_pictures_a_case_and_its_own_split(tmp_path, part):
    records, left_out = read(derm7pt(tmp_path) / part, modality="both")
    assert {n: (r.condition, r.group, r.modality, r.split) for n, r in records.items()} == {
        "NEL025.jpg": (BCC, "1", "dermoscopic", "train"),
        "Nel026.jpg": (BCC, "1", "clinical", "train"),
        "Fal1.jpg": (MEL, "2", "dermoscopic", "test"),
        "Fcl1.jpg": (MEL, "2", "clinical", "test"),
    }
    assert left_out == dict.fromkeys(("x.jpg", "y.jpg"), "beside train and test: valid")


def test_derm7pt_is_found_from_its_table_s_own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(derm7pt(tmp_path) / "meta")
    assert len(load_images("meta.csv", CONDITIONS, modality="both")[0]) == 4


def test_dermoscopy_and_photographs_are_not_mixed_unless_asked(tmp_path):
    derm7pt(tmp_path)
    with pytest.raises(ValueError, match="2 clinical and 2 dermoscopic pictures, which .* set modality to clinical, derm"):
        load_images(tmp_path, CONDITIONS)
    records, left_out = read(tmp_path, modality="clinical")
    assert set(records) == {"Nel026.jpg", "Fcl1.jpg"}
    assert left_out["Fal1.jpg"] == "not the modality asked for: dermoscopic"
    with pytest.raises(ValueError, match="modality='photo' must be clinical, dermoscopic or both"):
        load_images(tmp_path, CONDITIONS, modality="photo")
    (tmp_path / "ham").mkdir()
    draw(tmp_path / "ham", "ISIC_1.jpg")
    table(tmp_path / "ham" / "HAM10000_metadata.csv", HAM, "HAM_1,ISIC_1,mel,,,,")
    with pytest.raises(ValueError, match="holds 1 dermoscopic pictures, and modality=clinical takes none"):
        load_images(tmp_path / "ham", CONDITIONS, modality="clinical")
    with pytest.raises(ValueError):
        Settings(modality="photo")


def test_notebook_01_takes_its_modality_and_names_every_table_as_an_input(tmp_path):
    config = Settings(images=str(derm7pt(tmp_path) / "meta" / "meta.csv"), modality="dermoscopic")
    inputs = []
    run = SimpleNamespace(reads=lambda *paths: inputs.extend(paths), root=Path("/runs/r"))
    records, _ = gather_images(config, run, CONDITIONS)
    assert [Path(r.path).name for r in records] == ["NEL025.jpg", "Fal1.jpg"]
    assert inputs == [tmp_path / "meta" / "meta.csv", tmp_path], "with what lies below, tables and pictures"
    for images in (config.images, str(tmp_path)):
        run.root = tmp_path / "runs" / "r"
        with pytest.raises(ValueError, match="runs/r lies among the photographs"):
            gather_images(Settings(images=images, modality="dermoscopic"), run, CONDITIONS)
    assert seen_by("01_finetune", {"modality": "both"}) == {"modality": "both"}


def test_skincap_and_what_it_says_not_to_consider(tmp_path):
    draw(tmp_path, "skincap/1.png", "skincap/2.png", "skincap/3.png")
    header = "id,skincap_file_path,disease,caption_zh_polish_en,Papule,Do not consider this image,fitzpatrick_scale"
    rows = ['1,1.png,lichen-planus,"flat, purple",1,0,4', "2,2.png,psoriasis,x,0,1.0,4", "3,3.png,scabies,x,0,0,-1"]
    table(tmp_path / "skincap_v240623.csv", header, *rows)
    records, left_out = read(tmp_path)
    assert [(n, r.condition, r.skin_tone) for n, r in records.items()] == [("1.png", "lichen planus", "IV")]
    assert left_out == {
        "2.png": "not to be considered, says the set: psoriasis",
        "3.png": "not among the conditions: scabies",
    }


def test_derm1m_names_are_told_apart_by_their_folders(tmp_path):
    draw(tmp_path, "edu/0_1.png", "youtube/0_1.png")
    rows = ["IIYI/0_1.png,psoriasis,x", "edu/0_1.png,melanoma,x", "youtube/0_1.png,nodular melanoma,x"]
    rows += ["edu/9.png,no definitive diagnosis,x"]
    table(tmp_path / "Derm1M_v2_pretrain.csv", "filename,disease_label,truncated_caption", *rows)
    records, report = load_images(tmp_path, CONDITIONS)
    assert [(r.key, r.condition, r.modality) for r in records] == [
        ("edu/0_1.png", MEL, None),
        ("youtube/0_1.png", MEL, None),
    ]
    assert report["key"].tolist() == ["IIYI/0_1.png", "edu/9.png"]


def test_dermavqa_takes_the_one_condition_that_the_answers_name(tmp_path):
    answers = [
        ["This is psoriasis vulgaris.", "Psoriasis, use calcipotriol."],
        ["Eczema or psoriasis."],
        ["It is not eczema."],
        ["Use a cream."],
    ]
    draw(tmp_path, *(f"images_train/IMG_ENC{i}_1.jpg" for i in range(4)))
    cases = [
        {"encounter_id": f"ENC{i}", "image_ids": [f"IMG_ENC{i}_1.jpg"], "query_title_en": "Is it rosacea?",
         "responses": [{"content_en": text, "contains_freq_ans": 1.0} for text in texts]
         + [{"content_en": "Rosacea.", "contains_freq_ans": 0.0}]}
        for i, texts in enumerate(answers)
    ]  # fmt: skip
    (tmp_path / "train.json").write_text(json.dumps(cases))
    records, left_out = read(tmp_path)
    assert [(n, r.condition, r.group, r.split) for n, r in records.items()] == [
        ("IMG_ENC0_1.jpg", "psoriasis", "ENC0", "train")
    ]
    assert list(left_out.values()) == [
        "answers name several conditions: ENC1",
        "answers deny or weigh a diagnosis: ENC2",
        "answers name no condition: ENC3",
    ]
    (tmp_path / "train.json").write_text(json.dumps({"encounter_id": "ENC1", "image_ids": 3}))
    with pytest.raises(ValueError, match="train.json is no list of cases with image_ids"):
        load_images(tmp_path, CONDITIONS)


def test_dermnet_is_found_a_folder_deeper_and_without_its_split(tmp_path):
    draw(tmp_path / "dermnet", "dermnet/train/Acne and Rosacea Photos/rosacea-1.jpg")
    draw(tmp_path / "dermnet", "dermnet/test/Acne and Rosacea Photos/rosacea-2.jpg")
    records, _ = read(tmp_path / "dermnet")
    assert {n: (r.split, r.modality) for n, r in records.items()} == {
        "rosacea-1.jpg": ("train", "clinical"),
        "rosacea-2.jpg": ("test", "clinical"),
    }
    records, _ = read(tmp_path / "dermnet" / "dermnet" / "train")
    assert [(r.condition, r.split) for r in records.values()] == [("rosacea", None)]


def test_every_line_of_the_label_map_says_why_and_mixtures_are_no_condition():
    with (DATA / "published_labels.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    keys = [(row["set"], plain(row["code"])) for row in rows]
    assert len(set(keys)) == len(keys) and {row["set"] for row in rows} <= {"any", *(name for name, *_ in SETS)}
    assert all(len(row["why"]) > 10 and row["condition"] for row in rows)
    index = name_index(CONDITIONS)
    named = {(row["set"], row["code"]): index.get(plain(row["condition"])) for row in rows}
    assert {code for (name, code), condition in named.items() if name == "HAM10000" and condition} == {"bcc", "mel"}
    assert named["ISIC 2019", "BKL"] is None and named["DDI", "benign-keratosis"] is None
    codes = {name: {row["code"].lower() for row in rows if row["set"] == name} for name, *_ in SETS}
    for name, needs, reader in SETS:  # a column for each code
        assert reader.__name__ != "_one_hot" or set(needs.split()) - {"image"} <= codes[name]


def test_a_patient_of_a_published_set_is_on_one_side(tmp_path):
    names = [f"PAT_{n // 3}_1_{n}.png" for n in range(36)]
    draw(tmp_path, *names)
    said = ("BCC", "MEL", "ACK")
    rows = [pad_row(name, said[n % 3], f"PAT_{n // 3}") for n, name in enumerate(names)]
    table(tmp_path / "metadata.csv", PAD, *rows)
    records, _ = load_images(tmp_path, CONDITIONS)
    split, _ = split_records(records)
    patients = [{r.group for r in split[side]} for side in ("train", "test")]
    assert len(records) == 36 and all(patients) and not patients[0] & patients[1]


def test_a_picture_under_two_names_is_taken_once(tmp_path):
    draw(tmp_path, *(f"{n}.jpg" for n in range(8)))
    (tmp_path / "twin.jpg").write_bytes((tmp_path / "0.jpg").read_bytes())
    names = [*map(str, range(8)), "twin", "0.jpg"]  # the last lists a file again
    table(tmp_path / "HAM10000_metadata.csv", HAM, *(f"HAM_{n},{name},bcc,,,," for n, name in enumerate(names)))
    records, report = load_images(tmp_path, CONDITIONS)
    assert report.values.tolist() == [["0.jpg", "listed twice: 0.jpg"]]
    split, notes = split_records(records)
    assert notes.dropped == {"twin.jpg": "same file as 0.jpg"}
    assert sum(Path(r.path).name in ("0.jpg", "twin.jpg") for side in split.values() for r in side) == 1


def test_a_label_comes_from_its_own_column_alone(tmp_path):
    """Other columns hold names of conditions too: none of them may win, whatever the order of the columns."""
    draw(tmp_path / "fitz", "0a.jpg")
    columns = FITZ.split(",")
    row = dict.fromkeys(columns, "melanoma") | {"md5hash": "0a", "label": "psoriasis", "fitzpatrick_scale": "2", "qc": ""}
    table(tmp_path / "fitz" / "f.csv", ",".join(columns[::-1]), ",".join(row[c] for c in columns[::-1]))
    draw(tmp_path / "pad", "PAT_1_1_1.png")
    table(tmp_path / "pad" / "metadata.csv", PAD, pad_row("PAT_1_1_1.png", "ACK", "PAT_1", region="MEL"))
    for name, condition in (("fitz", "psoriasis"), ("pad", AK)):
        assert [r.condition for r in read(tmp_path / name)[0].values()] == [condition]


def test_tables_and_folders_that_disagree_are_not_believed(tmp_path):
    draw(tmp_path, "Melanoma/ISIC_1.jpg", "bcc/ISIC_2.jpg", "bcc/ISIC_3.jpg", "bcc/ISIC_4.jpg")
    rows = ["HAM_1,ISIC_1,bcc,,,,", "HAM_2,ISIC_2,bcc,,,,", "HAM_3,ISIC_3,bcc,,,,", "HAM_3,ISIC_3,mel,,,,"]
    table(tmp_path / "HAM10000_metadata.csv", HAM, *rows)
    records, report = load_images(tmp_path, CONDITIONS)
    assert [r.key for r in records] == ["bcc/ISIC_2.jpg"]
    assert report["reason"].tolist() == [
        f"in a folder of {MEL}, but listed as {BCC}: ISIC_1",
        "listed under two conditions: ISIC_3",
        "listed under two conditions: ISIC_3",
        "in no table: bcc/ISIC_4.jpg",
    ]


def test_patients_of_two_sets_in_one_folder_are_not_confused(tmp_path):
    for home in ("a", "b"):
        draw(tmp_path, f"{home}/PAT_1_1_1.png")
    table(tmp_path / "a" / "metadata.csv", PAD, pad_row("PAT_1_1_1.png", "ACK", "1"))
    table(tmp_path / "b" / "HAM10000_metadata.csv", HAM, "1,PAT_1_1_1,mel,,,,")
    records, report = load_images(tmp_path, CONDITIONS, modality="both")
    assert {r.key: (r.condition, r.group) for r in records} == {
        "a/PAT_1_1_1.png": (AK, "PAD-UFES-20 1"),
        "b/PAT_1_1_1.png": (MEL, "HAM10000 1"),
    }
    assert report.empty


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ("3.0 3,0 3 III iii FST3 FST_III type-III", "III"),
        ("12 1-2 I-II I/II", "I-II"),
        ("56 V-VI", "V-VI"),
        ("-1 -1.0 0 0.0 unknown nan NONE_SELECTED none", None),
        ("brown", "brown"),
        ("007", "007"),
    ],
)
def test_skin_types_have_one_form(given, kept):
    assert {skin_type(text) for text in given.split()} == {kept} and skin_type("") is None is skin_type(None)


def test_a_folder_with_a_table_of_its_own_says_to_give_the_table(tmp_path):
    """Also where its folders name conditions: the table may know which pictures are of one patient."""
    draw(tmp_path, "melanoma/a.png")
    load_images(tmp_path, CONDITIONS)
    table(tmp_path / "mine.csv", "path,condition,patient", "melanoma/a.png,melanoma,1")
    with pytest.raises(ValueError, match="has a table of its own, mine.csv, .* give mine.csv itself, or move it"):
        load_images(tmp_path, CONDITIONS)
    assert load_images(tmp_path / "mine.csv", CONDITIONS)[0][0].group == "1"


def test_data_prints_what_it_found_and_writes_a_table_that_is_read_again(tmp_path, monkeypatch, capsys):
    folder = derm7pt(tmp_path / "derm7pt")
    out = tmp_path / "table.csv"

    def data(*words):
        monkeypatch.setattr(sys, "argv", ["medprune", "data", *map(str, words)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        return stop.value.code, capsys.readouterr()

    code, said = data(folder)
    assert code == 2 and said.err.count("\n") == 1 and "not mixed unless asked" in said.err
    code, said = data(folder, "--modality", "both", "--out", out)
    lines = said.out.splitlines()
    assert code == 0 and lines[:2] == [
        "recognised: Derm7pt, by the columns of meta/meta.csv",
        "4 pictures: dermoscopic 2, clinical 2",
    ]
    assert [line.split() for line in lines if line.startswith(BCC)][0] == [*BCC.split(), "2", "1", "2"]
    assert f"{MEL}: all of one patient or lesion, so that no other is left to test on" in lines
    assert lines[-4:-2] == ["left out: 2", "  2 beside train and test: valid 2"]
    assert lines[-2].startswith("conditions without a picture: rosacea, actinic keratosis")
    before, _ = load_images(folder, CONDITIONS, modality="both")
    after, report = load_images(out, CONDITIONS, modality="both")
    assert report.empty and [
        (r.path, r.condition, r.group, r.skin_tone, r.modality, r.split) for r in before
    ] == [(r.path, r.condition, r.group, r.skin_tone, r.modality, r.split) for r in after]
    monkeypatch.setattr("medprune.data.records.describe_images", lambda *_: pytest.fail("pictures were read"))
    kept = out.read_bytes()
    for place, why in (("table.xlsx", "must end in .csv"), ("no/t.csv", "has no folder"), ("table.csv", "exists already")):
        code, said = data(folder, "--modality", "clinical", "--out", tmp_path / place)
        assert code == 2 and f"--out {tmp_path / place} {why}" in said.err and said.err.count("\n") == 1
    assert out.read_bytes() == kept


@needs_photos
def test_the_real_tables_load_as_they_are():
    lines, records = describe_images(PHOTOS / "pad_ufes_20", CONDITIONS)
    assert Counter(r.condition for r in records) == {BCC: 205, AK: 159, "seborrheic keratosis": 101, MEL: 38}
    with (PHOTOS / "pad_ufes_20" / "photos.csv").open(encoding="utf-8") as file:
        said = {Path(row["file"]).name: row for row in csv.DictReader(file)}
    for r in records:
        row = said[Path(r.path).name]
        assert (r.condition.replace(" ", "_"), r.group) == (row["condition"], row["patient_id"])
        assert r.skin_tone == skin_type(row["fitzpatrick"])
    assert "left out: 1544" in lines and any(line.startswith("  1544 listed, but no such picture") for line in lines)
    split, _ = split_records(records)
    assert not {r.group for r in split["train"]} & {r.group for r in split["test"]}
    assert all(len({r.condition for r in side}) == 4 for side in split.values())

    lines, records = describe_images(PHOTOS / "ham10000", CONDITIONS)
    assert Counter(r.condition for r in records) == {BCC: 150, MEL: 100} and all(r.group for r in records)
    assert "  67 not among the conditions: actinic keratosis or Bowen disease (akiec) 67" in lines


@needs_photos
def test_the_real_sets_together_are_refused_until_a_modality_is_chosen():
    with pytest.raises(ValueError, match="503 clinical and 250 dermoscopic"):
        load_images(PHOTOS, CONDITIONS, check=False)
    for modality, n in (("clinical", 503), ("dermoscopic", 250), ("both", 753)):
        assert len(load_images(PHOTOS, CONDITIONS, check=False, modality=modality)[0]) == n
