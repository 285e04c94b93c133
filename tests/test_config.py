"""Section 2: one table of knobs: defaults, parsing, ranges, relations, recipes, help, and refusals that name the mistake."""

import dataclasses
import difflib
import importlib.util
import re
import subprocess
import sys

import pytest

import train_gpt as tg
from conftest import REPO, clean_env

FIELDS = {f.name: f for f in dataclasses.fields(tg.Hyperparameters)}
from_env = tg.Hyperparameters.from_env


def test_defaults_are_the_submission():
    """The values of the 8xH100 run, as published."""
    h = tg.Hyperparameters()
    for name, value in dict(
            num_layers=11, model_dim=512, num_heads=8, num_kv_heads=4, mlp_mult=4, vocab_size=8192, leaky_slope=0.5,
            train_seq_len=2048, train_batch_tokens=786432, loop_start=3, loop_end=5, num_loops=2, enable_looping_at=0.35,
            parallel_start_layer=8, rope_dims=16, qk_gain_init=5.25, ln_scale=True, xsa_last_n=11,
            head_gate_scale=0.5, smear_gate="token", logit_softcap=30, max_wallclock_seconds=600, eval_stride=64,
            ttt_chunk_tokens=32768, matrix_bits=6, budget_bytes=16_000_000, ttt_enabled=True).items():
        assert getattr(h, name) == value, name
    assert h.head_dim == 64 and tg.roles(h)["w_up"].shape[1] == 2048
    assert from_env({}) == dataclasses.replace(h, recipe="record") and not from_env({}).changed()


def test_the_table_is_typed_and_frozen():
    """Every default has its declared type, every knob a meaning, and nobody can change a value."""
    for f in FIELDS.values():
        assert type(f.default).__name__ == f.type and len(f.metadata["meaning"]) >= 10, f.name
        assert f.metadata["check"](f.default), f.name
    with pytest.raises(dataclasses.FrozenInstanceError):
        tg.Hyperparameters().seed = 1


def test_environment_is_parsed_by_type():
    """Whole numbers may carry underscores, booleans are 0, 1, false, true, text stays as it is."""
    h = from_env(dict(NUM_LAYERS="9", TRAIN_BATCH_TOKENS="1_572_864", MATRIX_LR="2e-2", SKIP_GATES="0", LN_SCALE="true",
                      TTT_ENABLED=" False ", RUN_ID="a.b-1", LOGIT_SOFTCAP="20", DATA_DIR="", PATH="/bin"))
    assert (h.num_layers, h.train_batch_tokens, h.matrix_lr, h.logit_softcap) == (9, 1572864, 0.02, 20.0)
    assert (h.skip_gates, h.ln_scale, h.ttt_enabled, h.run_id, h.data_dir) == (False, True, False, "a.b-1", "")
    assert h.changed() == dict(num_layers=9, train_batch_tokens=1572864, matrix_lr=0.02, skip_gates=False,
                               ttt_enabled=False, logit_softcap=20.0)


@pytest.mark.parametrize("name, raw, wanted", [
    ("NUM_LAYERS", "eleven", "a whole number"), ("NUM_LAYERS", "11.0", "a whole number"), ("SEED", "", "a whole number"),
    ("MATRIX_LR", "1,5", "a number"), ("SKIP_GATES", "yes", "0 or 1"), ("SKIP_GATES", "2", "0 or 1")])
def test_values_of_the_wrong_type_are_refused(name, raw, wanted):
    """The sentence holds variable, value, the expected type and the meaning."""
    with pytest.raises(tg.Refusal) as refusal:
        from_env({name: raw})
    assert str(refusal.value) == f"{name}={raw!r} must be {wanted}: {FIELDS[name.lower()].metadata['meaning']}"


OUT_OF_RANGE = [(name, -1) for name, f in FIELDS.items() if f.type in ("int", "float")]
OUT_OF_RANGE += [(name, bad) for name, f in FIELDS.items() if f.type == "float" for bad in (float("nan"), float("inf"))]
OUT_OF_RANGE += [(name, 1.01) for name in ("leaky_slope", "enable_looping_at", "warmdown_frac", "min_lr")]
OUT_OF_RANGE += [(name, 1.0) for name in ("muon_momentum", "muon_momentum_warmup_start", "beta2", "ema_decay")]
OUT_OF_RANGE += [(name, 0) for name in (
    "num_layers", "model_dim", "num_heads", "num_kv_heads", "mlp_mult", "rope_dims", "rope_base", "qk_gain_init",
    "logit_softcap", "train_batch_tokens", "micro_batch_tokens",
    "train_log_every", "gptq_calibration_batches", "gptq_damping", "muon_backend_steps",
    "budget_bytes", "eval_stride", "eval_batch_tokens", "ttt_chunk_tokens", "ttt_batch_seqs",
    "ttt_lora_rank")]
OUT_OF_RANGE += [("vocab_size", 3), ("vocab_size", 65537), ("train_seq_len", 1), ("eval_seq_len", 1), ("matrix_bits", 1),
                 ("matrix_bits", 9), ("embed_bits", 1), ("embed_bits", 9), ("run_id", "a/b"), ("run_id", "a b"), ("run_id", ".."),
                 ("corpus", "web"), ("compile", "yes"), ("precision", "fp16"), ("compressor", "gzip"),
                 ("scores", "sliding,best"), ("ttt_targets", ""), ("ttt_targets", "q,"), ("ttt_targets", "q,,v")]


@pytest.mark.parametrize("name, value", OUT_OF_RANGE)
def test_ranges(name, value):
    """Each check refuses a value outside its range and says which knob, which value, what was expected and what it means."""
    with pytest.raises(tg.Refusal) as refusal:
        tg.Hyperparameters(**{name: value})
    begin, meaning = f"{name.upper()}={value!r} is out of range", FIELDS[name].metadata["meaning"]
    words = str(refusal.value).removeprefix(begin).removesuffix(f": {meaning}")
    assert str(refusal.value) == f"{begin}{words}: {meaning}"
    # a number says its range before its meaning or in it
    assert FIELDS[name].type == "str" or re.fullmatch(r", expected (above 0|\d+ or more|\d+ to \d+|in \[0, 1\)|below 2\^53)", words) or (
        not words and re.search(r"\d", meaning)), str(refusal.value)


@pytest.mark.parametrize("name, low, high", [("matrix_bits", 2, 8), ("num_layers", 1, 1000), ("vocab_size", 4, 65536),
                                             ("seed", 0, (1 << 63) - 1), ("xsa_last_n", 0, 1000), ("muon_backend_steps", 1, 5)])
def test_the_ranges_told_are_those_that_hold(name, low, high):
    """Both ends are allowed, what is beyond is refused with them."""
    check = FIELDS[name].metadata["check"]
    assert [check(v) for v in (low - 1, low, high, high + 1)] == [False, True, True, False]
    with pytest.raises(tg.Refusal, match=f"{name.upper()}={low - 1} is out of range, expected {low} to {high}: "):
        tg.Hyperparameters(**{name: low - 1})


def test_every_number_has_a_range():
    """The list above tests each numeric knob; text that is not a place or a list of names has a check too."""
    assert {name for name, _ in OUT_OF_RANGE} >= {
        name for name, f in FIELDS.items() if f.type in ("int", "float")} | {"compressor", "compile", "precision", "scores"}


RELATIONS = [
    (dict(model_dim=510), "MODEL_DIM=510 must be a multiple of NUM_HEADS=8"),
    (dict(num_kv_heads=3), "NUM_HEADS=8 must be a multiple of NUM_KV_HEADS=3"),
    (dict(mlp_mult=1.001), "MLP_MULT=1.001 x MODEL_DIM=512 must be a whole number"),
    (dict(rope_dims=15), "ROPE_DIMS=15 must be even and at most the head size MODEL_DIM / NUM_HEADS"),
    (dict(rope_dims=66), "ROPE_DIMS=66 must be even and at most the head size MODEL_DIM / NUM_HEADS"),
    (dict(loop_end=11), "LOOP_START=3 <= LOOP_END=11 < NUM_LAYERS=11 must hold"),
    (dict(loop_start=6), "LOOP_START=6 <= LOOP_END=5 < NUM_LAYERS=11 must hold"),
    (dict(train_batch_tokens=786433), "TRAIN_BATCH_TOKENS=786433 must be a multiple of MICRO_BATCH_TOKENS=98304"),
    (dict(train_seq_len=2000), "MICRO_BATCH_TOKENS=98304 must be a multiple of TRAIN_SEQ_LEN=2000"),
    (dict(eval_stride=2049), "EVAL_STRIDE=2049 must be at most EVAL_SEQ_LEN=2048"),
    (dict(ttt_chunk_tokens=3000), "TTT_CHUNK_TOKENS=3000 must be a multiple of TRAIN_SEQ_LEN=2048"),
    (dict(max_wallclock_seconds=0.0, iterations=0),
     "one of MAX_WALLCLOCK_SECONDS and ITERATIONS must be above zero"),
]


@pytest.mark.parametrize("knobs, sentence", RELATIONS)
def test_relations_between_knobs(knobs, sentence):
    """Contradicting knobs are refused with names and values."""
    with pytest.raises(tg.Refusal) as refusal:
        tg.Hyperparameters(**knobs)
    assert str(refusal.value).startswith(sentence)


def test_relations_that_do_not_bind():
    """A loop that is switched off may lie anywhere; one bound of training is enough."""
    assert tg.Hyperparameters(num_loops=0, loop_end=50).num_loops == 0
    assert tg.Hyperparameters(max_wallclock_seconds=0.0).iterations == 20000
    assert tg.Hyperparameters(iterations=0).max_wallclock_seconds == 600


@pytest.mark.parametrize("typo, meant", [
    ("NUM_LAYER", "NUM_LAYERS"), ("LAYERS_NUM", "NUM_LAYERS"), ("num_layers", "NUM_LAYERS"), ("MATRX_LR", "MATRIX_LR"),
    ("LR_MATRIX", "MATRIX_LR"), ("MAX_WALLCLOCK_SECOND", "MAX_WALLCLOCK_SECONDS"), ("TTT_ENABLE", "TTT_ENABLED"),
    ("VOCABSIZE", "VOCAB_SIZE"), ("seed", "SEED"), ("ttt", "TTT"), ("EVAL_STRIDES", "EVAL_STRIDE"), ("TRAIN_SEQLEN", "TRAIN_SEQ_LEN"), ("RECIPES", "RECIPE")])
def test_near_misses_are_refused_with_the_nearest_knob(typo, meant):
    """A typo must not train the wrong model."""
    with pytest.raises(tg.Refusal) as refusal:
        from_env({typo: "7"})
    assert str(refusal.value) == f"{typo} is no knob; did you mean {meant}? (it is set to '7')"


def test_ordinary_environments_are_accepted():
    """Variables of shells, launchers, CUDA, clusters and continuous integration are no near misses."""
    names = """PATH HOME USER SHELL TERM LANG LC_ALL PWD OLDPWD SHLVL EDITOR DISPLAY HOSTNAME LOGNAME MAIL TMPDIR TZ
        VIRTUAL_ENV CONDA_PREFIX CONDA_DEFAULT_ENV PYTHONPATH PYTHONHASHSEED PYTHONUNBUFFERED XDG_DATA_DIRS XDG_RUNTIME_DIR
        XDG_DATA_HOME XDG_CONFIG_DIRS SSH_AUTH_SOCK SSH_CONNECTION LD_LIBRARY_PATH CC CXX CFLAGS MAKEFLAGS CI GITHUB_RUN_ID
        GITHUB_WORKSPACE RUNNER_TEMP JOB_ID RANK LOCAL_RANK WORLD_SIZE LOCAL_WORLD_SIZE GROUP_RANK ROLE_RANK ROLE_NAME
        GROUP_WORLD_SIZE ROLE_WORLD_SIZE MASTER_ADDR MASTER_PORT TORCHELASTIC_RUN_ID TORCHELASTIC_RESTART_COUNT
        TORCHELASTIC_MAX_RESTARTS TORCHELASTIC_USE_AGENT_STORE TORCH_NCCL_ASYNC_ERROR_HANDLING OMP_NUM_THREADS
        MKL_NUM_THREADS CUDA_VISIBLE_DEVICES CUDA_HOME CUDA_VERSION NVIDIA_VISIBLE_DEVICES NCCL_DEBUG NCCL_SOCKET_IFNAME
        GLOO_SOCKET_IFNAME SLURM_JOB_ID SLURM_NNODES SLURM_PROCID SLURM_NTASKS SLURM_LOCALID HF_HOME HF_TOKEN
        TOKENIZERS_PARALLELISM TRITON_CACHE_DIR TRITON_INTERPRET TORCHINDUCTOR_CACHE_DIR WANDB_API_KEY WANDB_PROJECT
        PIP_INDEX_URL UV_INDEX_URL NO_COLOR COLUMNS LINES COMPILER KUBERNETES_SERVICE_HOST""".split()
    assert from_env(dict.fromkeys(names, "x")) == from_env({})


@pytest.mark.parametrize("env, value", [
    (dict(TTT_CHUNK_SIZE="24"), dict(ttt_stream_chunk=24)), (dict(PHASED_TTT_NUM_PHASES="2"), dict(ttt_phases=2)),
    (dict(VAL_BATCH_TOKENS="4096", TTT_EVAL_SEQ_LEN="1024"), dict(eval_batch_tokens=4096, eval_seq_len=1024)),
    (dict(TTT_EVAL_SEQ_LEN="1024", EVAL_SEQ_LEN="512"), dict(eval_seq_len=512)),    # our own name is stronger
    (dict(BETA1="0.9", ADAM_EPS="1e-08", TTT_BETA1="0.0", TIE_EMBEDDINGS="1", LQER_ENABLED="0", QAT_ENABLED=""), {}),
    (dict(WARMUP_STEPS="20", CHECKPOINT_EVERY="500", FUSED_CE_ENABLED="1", COMPRESSOR="pergroup"), {})])
def test_names_of_published_scripts_are_known(env, value):
    """Taken where we have the thing under another name; silent where the value is what is built in; a line, and no
    refusal, where no result depends on it."""
    assert from_env(env).changed() == value
    said = tg.known_names(env)[1]
    idle = {"WARMUP_STEPS", "CHECKPOINT_EVERY", "FUSED_CE_ENABLED"} & set(env)
    assert len(said) == bool(idle) and all(name in said[0] for name in idle)


def test_two_published_names_of_one_knob_must_agree():
    """Whichever came first would win in silence; our own name settles it."""
    assert from_env(dict(VAL_BATCH_TOKENS="4096", VAL_BATCH_SIZE="4096")).eval_batch_tokens == 4096
    with pytest.raises(tg.Refusal, match="VAL_BATCH_SIZE=2048, but its EVAL_BATCH_TOKENS is 4096"):
        from_env(dict(VAL_BATCH_TOKENS="4096", VAL_BATCH_SIZE="2048"))
    assert from_env(dict(VAL_BATCH_TOKENS="4096", VAL_BATCH_SIZE="2048", EVAL_BATCH_TOKENS="8192")).eval_batch_tokens == 8192


def test_published_names_without_a_counterpart_are_told_at_once():
    """One sentence with all of them: the run block of #1855's README, which brings five mechanisms that are not here."""
    block = """CASEOPS_ENABLED=1 ITERATIONS=20000 PHASED_TTT_ENABLED=1 PHASED_TTT_PREFIX_DOCS=2500 PHASED_TTT_NUM_PHASES=3
        EMBED_BITS=7 MLP_CLIP_SIGMAS=11.5 ATTN_CLIP_SIGMAS=13.0 EMBED_CLIP_SIGMAS=14.0 TTT_CHUNK_SIZE=48 WARMUP_STEPS=20
        GLOBAL_TTT_MOMENTUM=0.9 BETA2=0.99 TTT_BETA2=0.99 TTT_WEIGHT_DECAY=0.5 TTT_LORA_RANK=80 SPARSE_ATTN_GATE_SCALE=0.5
        GATED_ATTN_QUANT_GATE=1 SPARSE_ATTN_GATE_ENABLED=1 GATE_WINDOW=12 SMEAR_GATE_ENABLED=1 LQER_ENABLED=1 LQER_RANK=4
        FUSED_CE_ENABLED=1 COMPRESSOR=pergroup NCCL_NET=Socket"""
    env = dict(part.split("=") for part in block.split())
    with pytest.raises(tg.Refusal) as refusal:
        from_env(env)
    absent = ["PHASED_TTT_PREFIX_DOCS=2500", "MLP_CLIP_SIGMAS=11.5", "ATTN_CLIP_SIGMAS=13.0", "TTT_WEIGHT_DECAY=0.5",
              "LQER_ENABLED=1", "LQER_RANK=4"]
    assert str(refusal.value).split(": ")[0].split(", ") == absent
    left = from_env({n: v for n, v in env.items() if f"{n}={v}" not in absent})
    assert (left.ttt_phases, left.ttt_stream_chunk, left.head_gate_scale, left.compressor) == (3, 48, 0.5, "rans")


@pytest.mark.parametrize("env, lines", [
    (dict(MODEL_DIR="/models"), 1), (dict(LOG_DIR="/var/log", DATADIR="/x"), 2), (dict(SEEDS="1 2 3"), 0),
    (dict(TOKENIZERS_PATH="/t"), 1), (dict(MODELS_DIR="/m", DATA_ROOT="/d", DATA_FILE="x"), None)])
def test_places_of_others_are_no_typos(env, lines):
    """What a container or a shell sets runs, with a line at most for each."""
    assert from_env(env) == from_env({})
    assert lines is None or len(tg.known_names(env)[1]) == lines


@pytest.mark.parametrize("env", [
    dict(SEED=str(1 << 64)), dict(SEED="9" * 5000), dict(ITERATIONS="1" + "0" * 400), dict(TRAIN_SEQ_LEN=str(1 << 60)),
    dict(NUM_LAYERS="1000000000"), dict(NUM_LOOPS="99999"), dict(REHEARSAL_STEPS=str(10**9)), dict(TTT_LEARNERS=str(10**9)), dict(MATRIX_LR="1e400"), dict(MLP_MULT="nan")])
def test_numbers_beyond_all_use_are_refused(env):
    """In a sentence that names variable and value, whatever they would do later."""
    with pytest.raises(tg.Refusal, match=f"^{[*env][0]}="):
        from_env(env)


@pytest.mark.parametrize("text", ["raise ValueError(1)", "x = = 1", "import os; os.nothing", None])
def test_a_broken_package_is_a_missing_one(text, tmp_path, monkeypatch):
    """Half removed, built for another torch, or a mere folder of its name, such as a checkout."""
    name = f"broken_{len(text or '')}"
    if text is None:
        (tmp_path / name).mkdir()
    else:
        (tmp_path / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    assert tg.optional(name) is None and tg.optional("zlib") and tg.optional("json.decoder").JSONDecoder


def test_home_folders(monkeypatch):
    """A ~ that no shell has replaced, as in a file of variables: no folder of that name is made."""
    monkeypatch.setenv("HOME", "/home/me")
    h = from_env(dict(LOGS_DIR="~/logs", DATA_PATH="~/a b", DATA_DIR="./~", TOKENIZER_PATH="~nobody.here/x"))
    assert (h.logs_dir, h.data_path, h.data_dir, h.tokenizer_path) == ("/home/me/logs", "/home/me/a b", "./~", "~nobody.here/x")


@pytest.mark.parametrize("packed", [False, True])
def test_loaders_need_not_register_the_module(packed, tmp_path, capfd):
    """The community's review robot executes a submission without putting it into sys.modules (parameter-golf #906)."""
    path = REPO / "train_gpt.py"
    if packed:
        path = tmp_path / "packed.py"
        path.write_bytes(tg.pack_source((REPO / "train_gpt.py").read_text(), "RECIPE=demo"))
    spec = importlib.util.spec_from_file_location("by_spec", path)
    module, names = importlib.util.module_from_spec(spec), {"__name__": "by_exec", "__file__": str(path)}
    try:
        spec.loader.exec_module(module)
        exec(compile(path.read_bytes(), path, "exec"), names)
        exec(path.read_bytes(), nameless := {})    # of no file, under no name
        assert module.Hyperparameters().num_layers == names["Hyperparameters"]().num_layers == 11
        assert nameless["Hyperparameters"]().num_layers == 11
    finally:    # where the script has put an empty module
        for name in ("by_spec", "by_exec"):
            sys.modules.pop(name, None)
    assert capfd.readouterr() == ("", "")


def test_recipes():
    """Rows apply from left to right, single knobs override them, and the row names only knobs."""
    demo = from_env(dict(RECIPE="demo"))
    assert demo.num_layers == 4 and demo.recipe == "demo" and demo.changed()["vocab_size"] == 1024
    assert from_env({}, "demo") == demo == from_env(dict(RECIPE=""), "demo")
    assert from_env(dict(RECIPE="record"), "demo").num_layers == 11
    assert from_env(dict(RECIPE="demo", NUM_LAYERS="7")).num_layers == 7
    assert from_env(dict(RECIPE="demo"), base=dict(num_layers=8, seed=5)).seed == 5
    for name in tg.RECIPES:
        row = tg.apply_recipes(name, {})
        assert set(row) <= set(FIELDS), name
        assert all(type(v).__name__ == FIELDS[n].type for n, v in row.items()), name


def test_run_blocks_are_written_and_read():
    """What a run changed, as variables, makes the same hyperparameters again."""
    for name in tg.RECIPES:
        h = from_env(dict(RECIPE=name))
        again = from_env(dict(part.split("=", 1) for part in tg.run_block(h.changed()).split()))
        assert dataclasses.replace(again, recipe=name) == h


def test_recipes_apply_from_left_to_right(monkeypatch):
    """The later row wins; both leave their other knobs."""
    monkeypatch.setitem(tg.RECIPES, "a", "SEED=1 NUM_LAYERS=7")
    monkeypatch.setitem(tg.RECIPES, "b", "SEED=2 TTT_EPOCHS=1")
    monkeypatch.setitem(tg.RECIPES, "c", "RECIPE=a,b TTT_EPOCHS=5")
    h = from_env(dict(RECIPE="a,b"))
    assert (h.seed, h.num_layers, h.ttt_epochs) == (2, 7, 1) and from_env(dict(RECIPE="b,a")).seed == 1
    h = from_env(dict(RECIPE="c"))
    assert (h.seed, h.num_layers, h.ttt_epochs, h.recipe) == (2, 7, 5, "c")


def test_unknown_recipe_is_refused():
    """With the nearest one and the list."""
    with pytest.raises(tg.Refusal) as refusal:
        from_env(dict(RECIPE="record,dmo"))
    assert str(refusal.value).startswith("RECIPE=record,dmo: there is no recipe 'dmo'; did you mean 'demo'?; known: record,")


def test_help_lists_every_knob(capsys):
    """Name, type, default and meaning of each, in the order of the table; status 0. The real command: test_real_life.py."""
    assert tg.main(["--help"], {}) == 0
    said = capsys.readouterr()
    assert not said.err
    rows = re.findall(r"^  ([A-Z][A-Z0-9_]+) +(\w+) (.*)$", said.out, re.M)
    assert [name for name, _, _ in rows] == [name.upper() for name in FIELDS]
    for (name, kind, rest), f in zip(rows, FIELDS.values()):
        assert kind == f.type and rest.strip().startswith(str(f.default)) and rest.endswith(f.metadata["meaning"]), name
    assert all(recipe in said.out for recipe in tg.RECIPES)


def test_help_by_group(capsys):
    """The groups follow each other and hold every knob once; `--help GROUP` prints one; others are refused by name."""
    found = []
    for group in tg.GROUPS:
        assert tg.main(["--help", group], {}) == 0
        said = capsys.readouterr().out
        assert said.startswith(f"{group}: ") and said.strip() in tg.help_text()
        found += re.findall(r"^  ([A-Z0-9_]+) ", said, re.M)
    assert found == list(tg.KNOBS)
    assert tg.main(["--help", "models"], {}) == 2
    assert "--help models: expected one of run, model," in capsys.readouterr().err


def test_there_are_at_most_115_knobs():
    """What nobody would turn is a constant."""
    assert len(FIELDS) <= 115


def test_refusals_reach_the_user(tmp_path, monkeypatch, capsys):
    """One sentence on standard error, status 2, nothing left behind. The real command: test_pipeline.py."""
    monkeypatch.chdir(tmp_path)
    for env, args, sentence in [
            (dict(RECIPE="demo", NUM_LAYER=3), (), "NUM_LAYER is no knob; did you mean NUM_LAYERS? (it is set to '3')"),
            ({}, ("evl", "x"), "unknown verb 'evl'; did you mean 'eval'?; expected data, eval, submit, verify, report, sweep, "
             "--help, or nothing for a run")]:
        assert tg.main([*args], clean_env(**env)) == 2
        assert capsys.readouterr() == ("", f"train_gpt.py: error: {sentence}\n")
    assert not list(tmp_path.iterdir())


def test_import_has_no_side_effect(tmp_path):
    """Reviewers import the file and build the class: nothing is printed, written or joined."""
    code = ("import sys; sys.path.insert(0, sys.argv[1]); import train_gpt, torch;"
            "assert train_gpt.Hyperparameters().num_layers == 11 and not torch.distributed.is_initialized()")
    done = subprocess.run([sys.executable, "-B", "-c", code, str(REPO)], cwd=tmp_path, env=clean_env(WORLD_SIZE="4"),
                          capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "") and not list(tmp_path.iterdir())


README = REPO / "README.md"


@pytest.mark.skipif(not README.exists(), reason="there is no README yet")
def test_readme_names_only_knobs_that_exist():
    """Each name in its table of knob groups is one knob, once, in the order of the table; so are all that it sets."""
    text = README.read_text()
    groups = re.findall(r"^\|[^|`]+\| `([A-Z][A-Z0-9_ ]+)` \|$", text, re.M)
    listed, declared = " ".join(groups).split(), [name.upper() for name in FIELDS]
    hints = {n: difflib.get_close_matches(n, declared, 1) for n in {*listed, *re.findall(r"\b([A-Z][A-Z0-9_]{3,})=", text)}
             - set(declared) - {"OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "NCCL_DEBUG", "WORLD_SIZE", "RESULT", "BENCH", "SWEEP"}}
    assert not hints
    assert len(listed) == len(set(listed)) > 30
    for group in groups:
        places = [declared.index(name) for name in group.split()]
        assert min(places) >= 0 and len(places) > 2
    for name, default in re.findall(r"`([A-Z][A-Z0-9_]+)` \(default ([\w.,]+)\)", text):
        assert str(FIELDS[name.lower()].default) == default.replace(",", "").rstrip("."), name


CONTRACT = """ITERATIONS MAX_WALLCLOCK_SECONDS TRAIN_BATCH_TOKENS TRAIN_SEQ_LEN VAL_LOSS_EVERY NUM_LAYERS MODEL_DIM NUM_HEADS
    NUM_KV_HEADS MLP_MULT VOCAB_SIZE QK_GAIN_INIT XSA_LAST_N ROPE_DIMS LN_SCALE NUM_LOOPS LOOP_START LOOP_END
    ENABLE_LOOPING_AT MATRIX_LR SCALAR_LR TIED_EMBED_LR MUON_MOMENTUM MUON_WD EMA_DECAY WARMDOWN_FRAC MIN_LR GRAD_CLIP_NORM
    GPTQ_CALIBRATION_BATCHES GPTQ_RESERVE_SECONDS MATRIX_BITS EMBED_BITS MATRIX_CLIP_SIGMAS EMBED_CLIP_SIGMAS COMPRESSOR
    TTT_ENABLED TTT_LR TTT_EPOCHS TTT_CHUNK_TOKENS TTT_LORA_RANK EVAL_STRIDE EVAL_SEQ_LEN DATA_DIR DATA_PATH TOKENIZER_PATH
    SEED RUN_ID RECIPE CORPUS BUDGET_BYTES""".split()


@pytest.mark.parametrize("name", CONTRACT)
def test_the_names_that_sweep_scripts_use(name):
    """The leaderboard's names are knobs, or do nothing here, so that existing sweep scripts keep working."""
    assert name.lower() in FIELDS or name in tg.IDLE
