"""A Hugging Face tokenizer and chat template as llama.cpp holds them, or refused where it would split otherwise."""

import json

import gguf
import jinja2

from medprune.exporting.folders import Source
from medprune.store import read_json

NO_MERGE = -1e9  # score of a piece of several characters that no merge makes
MARKER = "<__media__>"  # what llama.cpp's server writes into a message for an image; its newer ones "<__media_..__>"
_QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LLAMA3 = _QWEN2.replace(r"\p{N}|", r"\p{N}{1,3}|", 1)


def pre_tokenizer(pre: dict | None) -> str:
    """Return llama.cpp's name of tokenizer.json's splitting; ValueError where none is known to split the same way."""
    pieces = (pre or {}).get("pretokenizers", [pre] if pre else [])
    plain = [_plain(piece) for piece in pieces]
    known = {
        ("bytes",): "gpt-2",
        ("digits", "bytes"): "smollm",
        (_QWEN2, "bytes only"): "qwen2",
        (_LLAMA3, "bytes only"): "llama-bpe",
    }
    if tuple(plain) not in known:
        raise ValueError(f"no pre-tokenizer of llama.cpp is known to split text as {json.dumps(pre)} does.")
    return known[tuple(plain)]


def _plain(piece: dict) -> str:
    kind = piece["type"]
    if kind == "ByteLevel" and not piece.get("add_prefix_space"):
        return "bytes" if piece.get("use_regex", True) else "bytes only"
    if kind == "Digits" and piece.get("individual_digits"):
        return "digits"
    if kind == "Split" and piece.get("behavior") == "Isolated" and not piece.get("invert"):
        return piece["pattern"].get("Regex", kind)
    return kind


def scores(merges: list, pieces: list[str]) -> list[float]:
    """Return the scores of a sentencepiece BPE whose tokenizer.model is gone: minus the rank of a piece's merge."""
    ranks: dict[str, float] = {}
    for rank, merge in enumerate(merges):
        ranks.setdefault("".join(merge if isinstance(merge, list) else merge.split(" ", 1)), -float(rank))
    return [ranks.get(piece, NO_MERGE if len(piece) > 1 else -float(len(merges))) for piece in pieces]


def add_tokenizer(writer, source: Source) -> None:
    """Put vocabulary, merges or scores, special tokens and the chat template into a GGUF.

    Raises ValueError for another tokenizer than byte-level BPE and Llama-2's.
    """
    raw, said = read_json(source.folder / "tokenizer.json"), source.processor.tokenizer
    model, added = raw["model"], {token["id"]: token for token in raw["added_tokens"]}
    if model["type"] != "BPE":
        raise ValueError(f"{source.folder} has a tokenizer of type {model['type']}; BPE is exported.")
    by_id = {i: piece for piece, i in model["vocab"].items()} | {i: t["content"] for i, t in added.items()}
    pieces = [by_id.get(i, f"[PAD{i}]") for i in range(source.text["vocab_size"])]
    like_llama_2 = model.get("byte_fallback")
    writer.add_tokenizer_model("llama" if like_llama_2 else "gpt2")
    writer.add_tokenizer_pre("default" if like_llama_2 else pre_tokenizer(raw["pre_tokenizer"]))
    writer.add_token_list(pieces)
    if like_llama_2:
        writer.add_token_scores(scores(model["merges"], pieces))
        writer.add_add_space_prefix(True)
    else:
        writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in model["merges"]])
    unknown = model["vocab"].get(model.get("unk_token") or "") if like_llama_2 else None
    writer.add_token_types([_kind(i, by_id, added, like_llama_2, unknown) for i in range(len(pieces))])
    ids = {"bos": said.bos_token_id, "eos": ends(source)[0], "pad": said.pad_token_id, "unk": unknown}
    for name, number in ids.items():
        if number is not None:
            getattr(writer, f"add_{name}_token_id")(number)
    writer.add_add_bos_token(said("a")["input_ids"][0] == said.bos_token_id)
    writer.add_add_eos_token(False)
    writer.add_chat_template(server_template(source.processor))


def _kind(number: int, by_id: dict, added: dict, byte_fallback: bool, unknown: int | None):
    kinds, piece = gguf.TokenType, by_id.get(number)
    if piece is None:
        return kinds.UNUSED
    if number == unknown:
        return kinds.UNKNOWN
    if number in added:
        return kinds.CONTROL if added[number]["special"] else kinds.USER_DEFINED
    return kinds.BYTE if byte_fallback and len(piece) == 6 and piece.startswith("<0x") else kinds.NORMAL


def ends(source: Source) -> list[int]:
    """Return the tokens that end an answer, the configuration's where no generation_config.json says it.

    ValueError where neither does.
    """
    file = source.folder / "generation_config.json"
    said = read_json(file).get("eos_token_id") if file.exists() else None
    said = source.text.get("eos_token_id") if said is None else said
    found = [said] if isinstance(said, int) else list(said or [])
    if not found:
        raise ValueError(f"{source.folder} says no eos_token_id, which ends an answer: put it into {file.name}.")
    return found


def chat_pieces(processor) -> dict[str, str]:
    """Return the constant texts of a chat template: before and after an image, a question, an answer, a system's words.

    keys: opening (before all, where no system's words are given), user, image (after an image's token), asked (after a
    question), assistant, answered, answering (the generation prompt) and, where the template takes them, system and
    told. Raises ValueError for a template that does not write them one after another.
    """
    q, again, a, s = ("QUESTION-7f3a", "AGAIN-7f3a", "ANSWER-7f3a", "SYSTEM-7f3a")
    asked = _message("user", q) | {"content": [{"type": "image"}, *_message("user", q)["content"]]}
    turns = [asked, _message("assistant", a), _message("user", again)]
    one, two, three = (processor.apply_chat_template(turns[:n]) for n in (1, 2, 3))
    told = processor.apply_chat_template([_message("system", s), asked])
    before, _, rest = one.partition(processor.image_token)
    answer, later = two.removeprefix(one), three.removeprefix(two)
    if not (two.startswith(one) and three.startswith(two) and q in rest and a in answer and again in later):
        raise ValueError("the chat template does not write image, question and answer one after another.")
    found = {"user": later.partition(again)[0]}
    found |= {"opening": before.removesuffix(found["user"])}
    found["image"], _, found["asked"] = rest.partition(q)
    found["answering"] = processor.apply_chat_template([asked], add_generation_prompt=True).removeprefix(one)
    found["assistant"], _, found["answered"] = answer.partition(a)
    if s in told and told.endswith(turn := one.removeprefix(found["opening"])):
        found["system"], _, found["told"] = told.removesuffix(turn).partition(s)
    return found


def _message(role: str, text: str) -> dict:
    return {"role": role, "content": [{"type": "text", "text": text}]}


def server_template(processor) -> str:
    """Return the chat template for a GGUF: of texts in which llama.cpp's server has put its marker for an image.

    The server joins a message's parts to one text, and what our template writes after an image, a newline, would be
    lost: it is put behind each marker. Raises ValueError where a prompt is not what the processor's template gives.
    """
    pieces = {name: json.dumps(text, ensure_ascii=False) for name, text in chat_pieces(processor).items()}
    behind = f" | replace('__>', '__>' + {pieces['image']})"
    user = (
        "{%- if message['content'] is string -%}{{ message['content']" + behind + " }}{%- else -%}"
        "{%- for part in message['content'] if part['type'] == 'text' -%}{{ part['text']" + behind + " }}{%- endfor -%}"
        "{%- endif -%}"
    )
    said = user.replace(behind, "")
    turns = [("user", "user", user, "asked"), ("assistant", "assistant", said, "answered")]
    turns += [("system", "system", said, "told")] if "system" in pieces else []
    template = "{%- for message in messages -%}{%- if loop.first and message['role'] != 'system' -%}"
    template += "{{ " + pieces["opening"] + " }}{%- endif -%}"
    for number, (role, before, content, after) in enumerate(turns):
        word = "elif" if number else "if"
        template += f"{{%- {word} message['role'] == '{role}' -%}}{{{{ {pieces[before]} }}}}{content}"
        template += f"{{{{ {pieces[after]} }}}}"
    template += (
        "{%- endif -%}{%- endfor -%}{%- if add_generation_prompt -%}{{ " + pieces["answering"] + " }}{%- endif -%}"
    )
    _check_template(template, processor)
    return template


def _check_template(template: str, processor) -> None:
    words = [("user", "What is it?"), ("assistant", "Rosacea."), ("user", "How is it treated?")]
    ours = [_message(role, text) for role, text in words]
    ours[0]["content"].insert(0, {"type": "image"})
    theirs = [{"role": role, "content": text} for role, text in words]
    theirs[0]["content"] = MARKER + theirs[0]["content"]
    compiled = jinja2.Template(template)
    for n in (1, 3):
        wanted = processor.apply_chat_template(ours[:n], add_generation_prompt=True)
        found = compiled.render(messages=theirs[:n], add_generation_prompt=True)
        if found.replace(MARKER, processor.image_token) != wanted:
            raise ValueError(f"the chat template is not one that a GGUF can carry: {found!r} is not {wanted!r}.")


def modelfile(processor, text: str, mmproj: str) -> str:
    """Return a Modelfile, from which Ollama makes a model of both files."""
    said = chat_pieces(processor)
    system = said["opening"]
    if "system" in said:
        told = said["system"] + "{{ .System }}" + said["told"]
        system = "{{ if .System }}" + told + "{{ else }}" + said["opening"] + "{{ end }}"
    turn = said["user"] + "{{ .Prompt }}" + said["asked"] + said["answering"] + "{{ .Response }}" + said["answered"]
    lines = [f"FROM ./{text}", f"FROM ./{mmproj}", f'TEMPLATE """{system}{turn}"""', "PARAMETER temperature 0"]
    return "\n".join([*lines, f'PARAMETER stop "{processor.tokenizer.eos_token}"']) + "\n"
