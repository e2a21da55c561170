"""One training step and one evaluated batch, ours against a peer's own code, in one process.

    OMP_NUM_THREADS=1 python tests/bench_peers.py --peer DIR [--batch 2 8 32 128]

DIR is a checkout of github.com/sunxm2357/DualCoOp or github.com/guozix/TaI-DPT; nothing in it or
here is changed. The peer trains with its own model, loss and loop (DualCoOp's `train_coop` and
`validate`, TaI-DPT's `forward_backward`), ours with train.py's step. All hold the same random
weights of OpenAI's architecture, images, names with a full stop, and a context a category: text
features, logits and loss are compared before anything is timed. What the peers import for data sets
and commands (torchvision, dassl) has stand-ins. On a CPU; turns and CPU time as in bench_step.py.
"""
import argparse
import contextlib
import importlib
import io
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent)]
import numpy
import torch
import torch.nn.functional as F
from bench_step import BACKBONES, interleaved, make_case, peak, random_clip, write_rows

import losses
import train
import trm
from clip.features import at_once
from config import Config


class TrainerX:
    """Of dassl what a step of TaI-DPT takes."""

    def model_backward_and_update(self, loss):
        self.optim.zero_grad()
        if not torch.isfinite(loss).all():
            raise FloatingPointError("Loss is infinite or NaN!")
        loss.backward()
        self.optim.step()


def peers_modules(folder, *names):
    """Modules of the peer. Meanwhile `import clip` means its package, not ours."""
    found = {name: mock.MagicMock() for name in (
        "torchvision", "torchvision.transforms", "torchvision.models", "torchvision.models._utils",
        "dassl", "dassl.engine", "dassl.metrics", "dassl.utils", "dassl.optim")}
    found["torchvision.models._utils"].IntermediateLayerGetter = (
        lambda module, layers: torch.nn.ModuleDict(module.named_children()))  # only its layers
    found["dassl.engine"].TrainerX = TrainerX
    found["dassl.engine"].TRAINER_REGISTRY.register = lambda: lambda trainer: trainer
    with (mock.patch.dict(sys.modules, found),
          mock.patch.object(sys, "path", [str(folder), *sys.path]),
          mock.patch.object(numpy, "deprecate", lambda function: function, create=True)):
        for name in [name for name in sys.modules if name.split(".")[0] == "clip"]:
            del sys.modules[name]
        return [importlib.import_module(name) for name in names]


def sgd(learner):
    return torch.optim.SGD(learner.parameters(), lr=0.002, momentum=0.9, weight_decay=5e-4)


def dualcoop(folder, case, size):
    """Each peer gives `step`, `evaluate`, `outputs` (text features (2, C, D) present and absent,
    logits (B, C), loss), and how it reads its aggregation: here the mean is a location, too."""
    module, clip, program = peers_modules(folder, "models.dualcoop", "clip.model", "utils.trainers")
    cfg = mock.MagicMock(**{
        "INPUT.SIZE": (size, size), "USE_CUDA": False, "TRAINER.FINETUNE_BACKBONE": False,
        "TRAINER.FINETUNE_ATTN": False, "TRAINER.COOP_MLC": SimpleNamespace(
            N_CTX_POS=16, N_CTX_NEG=16, POSITIVE_PROMPT_INIT="", NEGATIVE_PROMPT_INIT="", CSC=True,
            LS=100.0, ASL_GAMMA_NEG=2, ASL_GAMMA_POS=1)})
    args = SimpleNamespace(loss_w=1.0, print_freq=100, val_freq_in_epoch=-1, thre=0.5)
    module.load_clip_to_cpu = lambda cfg: clip.build_model_conv_proj(case.clip.state_dict(), cfg)
    model = module.dualcoop(cfg, case.names)
    learner = model.prompt_learner
    learner.ctx_pos.data, learner.ctx_neg.data = case.model.prompts.context.detach().clone()
    optimizer = sgd(learner)
    target = torch.where(case.labels == 0, -1, (case.labels == 1).long())
    batches = [(case.images, target[:, None])]

    def outputs():
        text = model.text_encoder(*learner()).unflatten(0, (2, -1)).flip(0)
        logits = model(case.images)  # (B, 2, C) absent, present
        loss = program.AsymmetricLoss(2, 1)(logits, target) / len(logits)
        return text, logits[:, 1] - logits[:, 0], loss

    def step():
        program.train_coop(batches, [], model, optimizer, mock.MagicMock(), args, cfg, 0)

    return SimpleNamespace(step=step, evaluate=lambda: program.validate(batches, model, args),
                           outputs=outputs, mean_token=True, scales=torch.tensor([100.0, 20.0]))


def tai_dpt(folder, case, size):
    module, clip = peers_modules(folder, "trainers.Caption_dual", "clip.model")
    cfg = mock.MagicMock(**{"TRAIN.LOSSFUNC": "dualcoop", "TRAINER.Caption": SimpleNamespace(
        N_CTX=16, CTX_INIT="", CSC=True, CLASS_TOKEN_POSITION="end", PREC="fp32")})
    model = module.DenseCLIP(cfg, case.names, clip.build_model(case.clip.state_dict()).float())
    learner = model.prompt_learner
    learner.ctx.data, learner.ctx_neg.data = case.model.prompts.context.detach().clone()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("prompt_learner" in name)
    trainer = object.__new__(module.Caption_dual)
    vars(trainer).update(model=model, cfg=cfg, device="cpu", batch_idx=0, num_batches=2,
                         optim=sgd(learner))

    def outputs():
        *prompts, _, _ = learner()
        text = [model.text_encoder(prompt, model.tokenized_prompts) for prompt in prompts]
        _, logits, _, _ = model(case.images)
        return torch.stack(text), logits, module.dualcoop_loss(logits, None, case.labels)

    return SimpleNamespace(
        step=lambda: trainer.forward_backward({"img": case.images, "label": case.labels}),
        evaluate=torch.no_grad()(lambda: model(case.images)), outputs=outputs, mean_token=False,
        scales=torch.tensor([3.91, 3.0]).exp())


def ours(case, matching):
    """train.py's step in stage two, and a batch of an evaluation, which keeps the texts."""
    model, cfg = case.model, Config(matching=matching, amp="none")
    if matching != "carl":
        model = trm.TRM(len(case.names), case.clip.D, case.model.prompts, matching)
    state = SimpleNamespace(optimizer=torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True),
                            scaler=torch.amp.GradScaler("cpu", enabled=False),
                            scheduler=mock.MagicMock())

    @torch.no_grad()
    def features():
        images = case.images.contiguous(memory_format=torch.channels_last)
        parts = images.split(at_once(images))
        return torch.cat([case.folded.encode_dense(part) for part in parts])

    def step():
        loss, _, _ = train.training_step(model, case.memory, case.clip, cfg, features(), None,
                                         case.labels, True)
        train.update(state, loss, cfg)

    with torch.no_grad():
        text = model.prompts(case.clip)
    evaluate = torch.no_grad()(lambda: model(features(), None, *text).logits_r.sigmoid())
    return SimpleNamespace(step=step, evaluate=evaluate, features=features, text=text)


def compare(folder, backbone, size, C, batch, repeats):
    encoder = random_clip(backbone)
    weights = {name: value.half() for name, value in encoder.state_dict().items()}  # as published
    weights["visual.attnpool.positional_embedding"].zero_()  # DualCoOp adds it to its locations
    encoder.load_state_dict(weights)
    case = make_case(backbone, size, C, batch, clip=encoder, end=".")
    with contextlib.redirect_stdout(io.StringIO()):
        peer = (dualcoop if (folder / "models").is_dir() else tai_dpt)(folder, case, size)
    ours_too = ours(case, "dualcoop")
    text, logits, loss = peer.outputs()
    f = ours_too.features()
    f = torch.cat([f.mean(1, keepdim=True), f], 1) if peer.mean_token else f
    expected, _ = trm.spatial_aggregation(f, *ours_too.text, *peer.scales)
    for what, theirs, mine in (
            ("text features", F.normalize(text, dim=-1), torch.stack(ours_too.text)),
            ("logits", logits, expected),
            ("loss", loss, losses.asymmetric(expected, case.labels))):
        gap = float((theirs - mine).abs().max() / mine.abs().max())
        print(f"{what}: {gap:.1e} of the largest apart")
        assert gap < 1e-4

    versions = {folder.name: peer, "ours, --matching dualcoop": ours_too,
                "ours, TRM-ML in stage two": ours(case, "carl")}
    rows = []
    for what in ("step", "evaluate"):
        works = [getattr(version, what) for version in versions.values()]
        with contextlib.redirect_stdout(io.StringIO()):  # the peers print in every step
            memory = [peak(work) for work in works]  # the turn that warms up
            times = interleaved(works, repeats, warm=False)
        for name, seconds, mib in zip(versions, times, memory):
            rows.append(dict(case=f"{folder.name} {backbone} {size} C {C} B {batch}", what=what,
                             version=name, seconds=seconds, ratio=times[0] / seconds, MiB=mib))
            print(f"{backbone} {size} C {C} B {batch:3} {what:8} {name:26} {seconds:8.3f} s "
                  f"{times[0] / seconds:6.2f} times {mib:6.0f} MiB", flush=True)
    write_rows("bench_peers.csv", rows)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--peer", type=Path, required=True, metavar="DIR")
    parser.add_argument("--batch", type=int, nargs="+", default=[2, 8, 32, 128])
    parser.add_argument("--backbone", default="RN50", choices=BACKBONES)
    for name, default in (("size", 224), ("classes", 80), ("repeats", 3)):
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    for batch in args.batch:
        compare(args.peer, args.backbone, args.size, args.classes, batch, args.repeats)
