"""What other tools call their flags, and what these are called here."""

from __future__ import annotations

import difflib
from collections.abc import Collection

NEAR = 0.8  # of difflib's ratio, from which two names may be one with a slip

# Flags of other tools -> ours, the first that a program has
CALLED_HERE: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("lr", "base_lr", "init_lr", "initial_lr", "max_lr"), ("learning_rate",)),
    **dict.fromkeys(("arch", "architecture", "encoder", "trunk"), ("backbone",)),
    **dict.fromkeys(("net", "network", "method", "model_name"), ("model",)),
    **dict.fromkeys(("bs", "batch", "train_batch_size", "per_device_train_batch_size"), ("batch_size",)),
    **dict.fromkeys(("test_batch_size", "val_batch_size", "eval_batch_size"), ("evaluation_batch_size",)),
    **dict.fromkeys(("num_epochs", "n_epochs", "max_epochs", "num_train_epochs"), ("epochs",)),
    **dict.fromkeys(("opt", "optim"), ("optimizer",)),
    **dict.fromkeys(("sched", "scheduler", "lr_scheduler", "lr_schedule", "lr_policy"), ("schedule",)),
    **dict.fromkeys(("wd", "l2"), ("weight_decay",)),
    **dict.fromkeys(("num_workers", "n_workers", "dataloader_num_workers", "jobs"), ("workers",)),
    **dict.fromkeys(("img_size", "imgsz", "imsize", "resolution", "crop_size", "input"), ("input_size", "pictures")),
    **dict.fromkeys(("data", "data_dir", "data_path", "root", "dataset_dir", "train_dir", "images"), ("data_root",)),
    **dict.fromkeys(("output", "output_dir", "out_dir", "save_dir", "work_dir", "logdir"), ("out", "checkpoint_dir")),
    **dict.fromkeys(("log_dir", "exp_dir", "save_path"), ("out", "checkpoint_dir")),
    **dict.fromkeys(("gpu", "gpus", "gpu_id", "gpu_ids", "cuda"), ("device",)),
    **dict.fromkeys(("amp", "fp16", "bf16", "half", "mixed_precision"), ("precision",)),
    **dict.fromkeys(("smoothing", "ls"), ("label_smoothing",)),
    **dict.fromkeys(("clip_grad", "grad_clip", "clip", "max_grad_norm", "gradient_clip_val"), ("clip_gradient_norm",)),
    **dict.fromkeys(("val_split", "val_fraction", "val_ratio", "validation_split"), ("validation",)),
    **dict.fromkeys(("drop", "drop_rate", "dropout_rate"), ("dropout",)),
    **dict.fromkeys(("warmup", "warmup_steps"), ("linear_warmup_epochs", "warmup_epochs")),
    **dict.fromkeys(("exp", "exp_name", "experiment", "run_name"), ("name",)),
    **dict.fromkeys(("weights", "ckpt", "model_path", "load"), ("checkpoint", "pretrained")),
    **dict.fromkeys(("early_stopping", "early_stop"), ("patience",)),
    **dict.fromkeys(("top_k", "topk"), ("top",)),
    **dict.fromkeys(("gradient_accumulation_steps", "accumulation_steps", "accum_iter"), ("gradient_accumulation",)),
    **dict.fromkeys(("grad_accum_steps", "accumulate_grad_batches", "iter_size"), ("gradient_accumulation",)),
    **dict.fromkeys(("aa", "autoaugment", "trivial_augment", "rand_augment", "randaug", "ra"), ("auto_augment",)),
    "parts_in_answer": ("parts_in_prediction",),  # its name in older versions
    "steps": ("milestones",),
    "random_seed": ("seed",),
    "ema": ("ema_decay",),
}
# Flags of other tools that have no counterpart -> what does it here
DONE_HERE: dict[str, str] = {
    **dict.fromkeys(("eval", "evaluate", "test", "test_only"), "python test.py FILE evaluates a checkpoint"),
    **dict.fromkeys(("num_classes", "n_classes", "nb_classes"), "classes are counted in the data"),
    **dict.fromkeys(
        ("distributed", "local_rank", "world_size", "nproc_per_node", "multi_gpu"),
        "several processes are started by torchrun --nproc_per_node N train.py ...",
    ),
}
# The same of what only one of our programs does -> a flag that it has, with which it is true
DONE_WITH: dict[str, tuple[str, str]] = {
    **dict.fromkeys(
        ("resume", "auto_resume", "continue"), ("fresh", "the same command again continues a run by itself")
    ),
    **dict.fromkeys(("source", "image", "images", "img"), ("top", "pictures and folders are named without a flag")),
    "overwrite": ("fresh", "--fresh starts a run anew"),
}


def advice(flag: str, known: Collection[str]) -> str:
    """What to add to the refusal of a flag: its name here, how it is done here, a near name, or nothing.

    known: the flags that there are, each with its dashes.
    """
    name = flag.lstrip("-").replace("-", "_").lower()
    if f"--{name}" in known:
        return f"; did you mean --{name}?"
    for ours in CALLED_HERE.get(name, ()):
        if f"--{ours}" in known:
            return f"; it is --{ours} here"
    if name in DONE_WITH and f"--{DONE_WITH[name][0]}" in known:
        return f"; {DONE_WITH[name][1]}"
    if name in DONE_HERE:
        return f"; {DONE_HERE[name]}"
    near = difflib.get_close_matches(name, [word.lstrip("-") for word in known if word.startswith("--")], 1, NEAR)
    return f"; did you mean --{near[0]}?" if name and near else ""
