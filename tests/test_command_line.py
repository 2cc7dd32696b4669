"""The command line: every field a flag with its type, the help, and what is refused."""

from __future__ import annotations

import pytest
from setting_values import IS_FLAG, RECORDS, default_of, hint_of, is_of, taken, words

from config import DATASETS, Settings, SettingsError, complete, parse_settings
from networks import MODELS, build_network, find_system
from utils.command_line import blocks, parse_flags
from utils.errors import exit_with_one_sentence
from utils.flags import comments
from utils.options import checked, hints
from utils.other_flags import advice

CUB = ["--dataset", "cub", "--data_root", "somewhere"]


def parsed(model: str, *arguments: str) -> object:
    """The record of a model, or of what all share for "", as these flags leave it."""
    record = RECORDS[model]
    (values,) = parse_flags(arguments, {model: record}, description="", explain=lambda name: None)
    return checked(record(**values))


# ---- Flags ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("model", "name"), IS_FLAG)
def test_every_field_is_a_flag_with_its_annotated_type(model, name):
    hint = hint_of(model, name)
    default = default_of(model, name)
    for expected in [*taken(hint), *([] if default is None else [default])]:
        if isinstance(expected, bool):
            flag = [f"--{name}" if expected else f"--no-{name}"]
        else:
            flag = [f"--{name}", *words(expected)]
        value = getattr(parsed(model, *flag), name)
        assert (value, type(value)) == (expected, type(expected))
        assert is_of(value, hint), f"{value!r} is a {type(value).__name__}"


@pytest.mark.parametrize(
    ("model", "flag", "expected"),
    [
        ("flrdf", "--suppression learnable", "learnable"),
        ("flrdf", "--suppression 1", 1.0),
        ("flrdf", "--suppression 0.7", 0.7),
        ("sgkrl", "--windows vehicles", "vehicles"),
        ("sgkrl", "--without fusion weighting", ("fusion", "weighting")),
        ("sgkrl", "--without", ()),
        ("scrim", "--anchor_sizes 32 64 128", (32, 64, 128)),
        ("", "--milestones", ()),
        ("", "--loss_weights", {}),
        ("", "--loss_weights object=2 window=0.5", {"object": 2.0, "window": 0.5}),
        ("", "--learning_rate 2e-2", 0.02),
        ("", "--classes *_Gull Crow", ("*_Gull", "Crow")),
    ],
)
def test_words_behind_a_flag(model, flag, expected):
    name, *_ = flag.removeprefix("--").split()
    value = getattr(parsed(model, *flag.split()), name)
    assert (value, repr(value)) == (expected, repr(expected))


@pytest.mark.parametrize("word", ["object", "object=", "object=much"])
def test_malformed_weights_are_refused(word):
    with pytest.raises(SettingsError) as refusal:
        parse_settings([*CUB, "--loss_weights", "raw=1", word])
    assert repr(word) in str(refusal.value)
    assert "name=number" in str(refusal.value)


@pytest.mark.parametrize(
    "arguments",
    [
        *(["--epochs", "5.5"], ["--epochs", "many"], ["--learning_rate", "fast"], ["--milestones", "3", "x"]),
        *(["--epochs", "1" * 5000], ["--epochs", "3\n4"], ["--epochs"], ["--channels_last=3"]),
        *(["--graph_neighbours", "two"], ["--model"]),
    ],
    ids=lambda arguments: " ".join(arguments)[:20],
)
def test_a_value_of_another_type_is_refused(arguments):
    with pytest.raises(SettingsError) as refusal:
        parse_settings([*CUB, *arguments])
    sentence = str(refusal.value)
    assert sentence.isprintable()
    assert len(sentence) < 600
    assert arguments[0].partition("=")[0] in sentence
    if len(arguments) > 1:
        assert repr(arguments[-1])[:300] in sentence
    assert "--help" in sentence


@pytest.mark.parametrize("word", ["(((", "((((5, 5),), 1),", "(five, five)", "(1 2)", "({[]},)", "(\0)", "(" * 300])
def test_malformed_windows_are_refused_in_one_sentence(word):
    with pytest.raises(SettingsError) as refusal:
        parse_settings([*CUB, "--windows", word])
    sentence = str(refusal.value)
    assert sentence.isprintable()
    assert "windows" in sentence
    assert f"{word!r}; expected" in sentence


# ---- The help -------------------------------------------------------------------------------------------------------


def help_text(capsys: pytest.CaptureFixture, *arguments: str) -> str:
    with pytest.raises(SystemExit) as ending:
        parse_settings(arguments)
    assert ending.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("flag", ["-h", "--help", "--help_all"])
@pytest.mark.parametrize("model", MODELS)
def test_help_shows_shared_settings_and_those_of_the_model_with_their_defaults_under_headings(model, flag, capsys):
    text = help_text(capsys, flag, "--model", model)
    own = list(hints(find_system(model).Options))
    sections = blocks(Settings) | ({f"Only {model}": own} if own else {})
    assert list(sections)[:2] == ["What to train, and on what", "Which images choose the best epoch"]
    assert len(sections) == 7 + bool(own)
    ends = [text.index(f"\n{heading}:") for heading in sections] + [len(text)]
    assert ends == sorted(ends)
    for (heading, names), start, end in zip(sections.items(), ends[:-1], ends[1:], strict=True):
        listed = text[start:end]
        for name in names:
            assert f"--{name}" in listed.replace(",", " ").split(), (heading, name)
            shown = DATASETS["demo"].get(name) if name in own else None
            shown = default_of(model if name in own else "", name) if shown is None else shown
            assert repr(shown) in " ".join(listed.split()), name
    strangers = {name for other in MODELS for name in hints(find_system(other).Options)} - set(own)
    assert not [name for name in strangers if f"--{name}" in text.replace(",", " ").split()]
    assert "'sgkrl'" in text
    assert "--options" not in text


@pytest.mark.parametrize("model", MODELS)
def test_help_fits_a_screen(model, capsys):
    lines = help_text(capsys, "--help", "--model", model).splitlines()
    assert len(lines) <= 40
    assert max(map(len, lines)) <= 120
    assert "" not in lines[4:-3]


@pytest.mark.parametrize("model", RECORDS)
def test_every_field_is_commented_where_it_stands(model):
    assert comments(RECORDS[model]).keys() == hints(RECORDS[model]).keys()
    assert all(len(comment) > 5 for comment in comments(RECORDS[model]).values())


@pytest.mark.parametrize("model", MODELS)
def test_the_long_help_explains_every_setting(model, capsys):
    text = " ".join(help_text(capsys, "--help_all", "--model", model).split())
    explained = comments(Settings) | comments(find_system(model).Options)
    del explained["options"]
    # argparse breaks lines at hyphens, too
    missing = [name for name, comment in explained.items() if comment.replace("- ", "-") not in text.replace("- ", "-")]
    assert not missing
    assert "what the backbone sees: a multiple of 32" in text  # input_size's comment


def test_the_long_help_lists_choices(capsys):
    text = help_text(capsys, "--help_all", "--model", "flrdf")
    assert "--schedule {steps,one_cycle,cosine,cosine_per_step,exponential}" in text
    assert "--select_on {validation,test}" in text
    assert "--localization_stride {32,16}" in text
    assert "--suppression VALUE" in text  # a choice or a number


def test_fields_of_every_record_are_flags_of_one_command_line():
    """No option may have the name of a shared setting."""
    for model in MODELS:
        assert not set(hints(find_system(model).Options)) & set(hints(Settings))
    assert {name for names in blocks(Settings).values() for name in names} == set(hints(Settings)) - {"options"}


# ---- What is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "guess"),
    [
        (["--epoch", "3"], "--epochs"),
        (["--learning-rate", "1"], "--learning_rate"),
        (["--learning-rate=1"], "--learning_rate"),
        (["--learning_rates", "1"], "--learning_rate"),
        (["--graph_neighbors", "1"], "--graph_neighbours"),
        (["--zzz"], None),
        (["stray"], None),
        (["line\nbreak\x1b[31m\udcff"], None),
    ],
)
def test_an_unknown_flag_is_refused(words, guess):
    with pytest.raises(SettingsError) as refusal:
        parse_settings([*CUB, *words])
    sentence = str(refusal.value)
    assert sentence.isprintable()
    assert words[0].split("\n")[0] in sentence
    assert (f"did you mean {guess}?" if guess else "unrecognized") in sentence
    assert "--help" in sentence


# a setting of its own of every system, and a system that does not have it
STRANGERS = [
    (name, next(other for other in MODELS if name not in hints(find_system(other).Options)), model)
    for model in MODELS
    for name in hints(find_system(model).Options)
]


@pytest.mark.parametrize(("name", "model", "owner"), STRANGERS)
def test_a_setting_of_another_system_is_refused_by_name_wherever_it_is_given(name, model, owner):
    value = getattr(find_system(owner).Options(), name)
    ways = [
        lambda: parse_settings(["--model", model, f"--{name}", "9"]),
        lambda: parse_settings([f"--{name}=9", "--model", model]),
        lambda: parse_settings(["--model", model, f"--no-{name}"]),
        lambda: complete(Settings(model=model, options={name: value})),
        lambda: build_network(model, num_classes=3, **{name: value}),
    ]
    for refuse in ways:
        with pytest.raises(SettingsError) as refusal:
            refuse()
        assert str(refusal.value).startswith(f"{name} is a setting of ")
        assert owner in str(refusal.value).split(", not of ")[0]
        assert f"not of {model}:" in str(refusal.value)


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        (["--wiring", "published"], "sgkrl_published"),
        (["--wiring=published"], "sgkrl_published"),
        (["--model", "mmal", "--wiring", "trained"], "sgkrl_published"),
        (["--answer", "raw"], "prediction"),
        (["--options", "{}"], "--graph_neighbours 2"),
    ],
)
def test_flags_of_former_versions_are_refused_with_what_took_their_place(words, hint):
    with pytest.raises(SettingsError) as refusal:
        parse_settings(words)
    assert hint in str(refusal.value)
    assert "unrecognized" not in str(refusal.value)


@pytest.mark.parametrize("words", [["--epochs", "many"], ["--epoch", "3"], ["--epochs", "0"]])
def test_what_is_refused_ends_the_program_with_one_line(words, capsys):
    with pytest.raises(SystemExit) as ending, exit_with_one_sentence():
        parse_settings(words)
    assert ending.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    assert line.startswith("error: ")
    assert words[0].strip("-") in line


@pytest.mark.parametrize(
    ("flag", "words"),
    [
        ("--resume", "continues a run by itself"),
        ("--lr", "it is --learning_rate here"),
        ("--learning-rate", "mean --le"),
    ]
    + [
        ("--arch", "it is --backbone here"),
        ("--num_classes", "counted in the data"),
        ("--data-dir", "--data_root here"),
        ("--images", "--data_root here"),
        ("--overwrite", "--fresh starts a run anew"),
    ],
)
def test_flags_of_other_tools_lead_to_ours(flag, words):
    with pytest.raises(SettingsError, match=words):
        parse_settings([*CUB, flag, "1"])


def test_what_one_program_does_another_does_not_promise():
    assert "continues a run" not in advice("--resume", {"--checkpoint", "--top"})
    assert "--fresh" not in advice("--overwrite", {"--checkpoint", "--out"})
    assert "named without a flag" in advice("--source", {"--checkpoint", "--top"})
    assert "named without a flag" not in advice("--source", {"--data_root", "--fresh"})


@pytest.mark.parametrize("flag", ["--fox", "--archive", "--lrx", "--xyz"])
def test_far_names_are_not_guessed(flag):
    with pytest.raises(SettingsError) as refusal:
        parse_settings([*CUB, flag, "1"])
    assert "did you mean" not in str(refusal.value)


def test_a_data_set_without_a_folder_is_told_the_flag():
    with pytest.raises(
        SettingsError, match="data_root is None; expected the folder of .* data set folder: give --data"
    ):
        parse_settings(["--dataset", "folder"])
