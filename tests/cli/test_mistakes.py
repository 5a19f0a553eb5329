"""Mistakes of the user: one line that names the culprit and what would be right, and nothing is trained or written."""

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import pytest
import torch

from simclr_scale.pretraining.run_folder import RunFolder
from tests.cli.commands import files_below, start_command, write_images

Refusal = Callable[..., str]
QUICK = ("pretrain", "--config", "quickstart")


@pytest.fixture(autouse=True)
def _no_training(monkeypatch: pytest.MonkeyPatch) -> None:
    def on_fit_start(*arguments: object) -> NoReturn:
        raise AssertionError("training started")

    monkeypatch.setattr(RunFolder, "on_fit_start", on_fit_start)


OPTIONS = [
    # names
    ("--model.temprature 0.1", "there is no option model.temprature; did you mean model.temperature?"),
    ("--dta.source x", "there is no option dta.source; did you mean data.source?"),
    ("--trainer.max_epoch 3", "there is no option trainer.max_epoch; did you mean trainer.max_epochs"),
    ("--trainer.nonsense 3", "there is no option trainer.nonsense; --help lists all"),
    ("--epochs 3", "there is no option epochs; did you mean trainer.max_epochs?"),
    ("--lr 3", "there is no option lr; did you mean model.learning_rate?"),
    ("again", "'again' has no name before it, as in --NAME again; --help lists the names"),
    ("--model.encoder.nme resnet18", "model.encoder: there is no option nme; did you mean name?"),
    ("--model.encoder.name resnet19", "unknown encoder 'resnet19'; did you mean 'resnet18'"),
    ("--model.encoder resnet18", "model.encoder: resnet18 is not the import path of a class or function"),
    ("--config cifar10_spectral --model.loss.mu 0", "mu must be above 0, or None for no bound, got 0.0"),
    ("--config cifar10_sigmoid --model.loss.scale 0", "scale must be above 0, got 0.0"),
    ("--model.optimizer AdamX", "model.optimizer: AdamX is not the import path of a class or function"),
    ("--model.optimizer.beta 1", "model.optimizer: there is no option beta; did you mean betas?"),
    ("--model.optimizer.lr 0.1", "model.optimizer: there is no option lr; did you mean model.learning_rate?"),
    (
        "--model.optimizer.init_args.lr fast",
        "model.optimizer: there is no option lr; did you mean model.learning_rate?",
    ),
    ("--model.optimizer.weight_decay 1", "there is no option weight_decay; did you mean model.weight_decay?"),
    ("--data.preset smal", "data.preset: expected one of 'natural', 'small', 'grey', 'multiband'; got smal"),
    ("--data.augmentation.hew 1", "data.augmentation has no field hew; --data.augmentation.help lists what it has"),
    ("--model.lr_scaling cubic", "model.lr_scaling: expected one of 'linear', 'sqrt'; got cubic"),
    ("--trainer.accelerator gup", "trainer: You selected an invalid accelerator name: `accelerator='gup'`"),
    ("--trainer.strategy dpp", "trainer: You selected an invalid strategy name: `strategy='dpp'`"),
    (
        "--trainer.devices 3 --trainer.strategy MeshStrategy --trainer.strategy.tensor_parallel_size 2",
        "data_parallel_size 1 by tensor_parallel_size 2 are 2 processes, and trainer.devices by trainer.num_nodes 3",
    ),
    (
        "--trainer.devices 2 --trainer.strategy MeshStrategy --trainer.strategy.tensor_parallel_size 2",
        "tensor_parallel_size 2 is for vision transformers of timm's plain blocks, and model.encoder simclr_resnet",
    ),
    (
        "--trainer.devices 2 --trainer.strategy model_parallel --model.compile true",
        "model.compile is not supported with a trainer.strategy that shards weights: leave one out",
    ),
    (
        "--trainer.devices 2 --trainer.strategy model_parallel --model.local_losses.overlap 1",
        "model.local_losses does not go with a trainer.strategy that shards weights: leave one out",
    ),
    (
        "--trainer.strategy ModelParallelStrategy --trainer.strategy.data_parallel_size 1",
        "trainer.strategy ModelParallelStrategy unpickles checkpoints; give simclr_scale's, MeshStrategy or model_par",
    ),
    ("--model.init_from nowhere", "there is no encoder 'nowhere'; give a run, a bundle or a .ckpt file"),
    ("--model.init_from random:resnet18", "model.init_from random:resnet18: its weights do not fit model.encoder"),
    # types
    ("--model.learning_rate fast", "model.learning_rate: expected float; got fast"),
    ("--data.global_batch_size many", "data.global_batch_size: expected int; got many"),
    ("--data.global_batch_size 64.5", "data.global_batch_size: expected int; got 64.5"),
    ("--data.augmentation.crop_scale 3", "data.augmentation: expected tuple; got 3"),
    ("--trainer.max_epochs x", "trainer.max_epochs: expected int; got x"),
    ("--seed_everything true", "seed_everything: expected int; got True"),
    ("--name", "argument --name: expected one argument"),
    # values
    ("--data.global_batch_size 1", "data.global_batch_size must be at least 2 (one image has no negatives), got 1"),
    ("--data.global_batch_size 99999", "data.global_batch_size 99999 is larger than the training set of"),
    ("--trainer.accumulate_grad_batches 2", "trainer.accumulate_grad_batches 2 would not add negatives: keep it at 1"),
    ("--model.warmup_epochs 3000", "warm-up must have at least 0 steps and at most the"),
    ("--model.temperature -1", "model.temperature must be above 0, got -1.0"),
    ("--model.weight_decay -1", "model.weight_decay must be 0 or above, got -1.0"),
    ("--model.loss_scale 0", "model.loss_scale must be above 0, got 0.0"),
    ("--trainer.max_epochs 0", "trainer.max_epochs is 0: there is nothing to train"),
    ("--trainer.limit_train_batches 0", "trainer.limit_train_batches is 0: there is nothing to train"),
    ("--model.learning_rate -1", "the base learning rate must be finite and above 0, got -1.0"),
    ("--trainer.max_epochs -1", "training has no end: give --trainer.max_epochs or --trainer.max_steps"),
    ("--trainer.devices 0", "trainer: `Trainer(devices='0')` value is not a valid input"),
    ("--seed_everything -1", "seed_everything must be from 0 to 2^32 - 1, got -1"),
    ("--threads 0", "--threads must be at least 1, got 0"),
    ("--knn.k 0", "knn.k must be at least 1, got 0"),
    ("--checkpoint.keep 0", "checkpoint.keep must be at least 1, got 0"),
    ("--checkpoint.every_n_minutes 0", "checkpoint.every_n_minutes must be above 0, got 0.0"),
    ("--checkpoint.every_n_minutes -1", "checkpoint.every_n_minutes must be above 0, got -1.0"),
    ("--checkpoint.every_n_minutes often", "checkpoint.every_n_minutes: expected float; got often"),
    ("--max_bad_steps 0", "--max_bad_steps must be at least 1, got 0"),
    ("--max_bad_steps -3", "--max_bad_steps must be at least 1, got -3"),
    ("--timeout 0", "--timeout must be from 10 to 1e+07 seconds, got 0"),
    ("--timeout -60", "--timeout must be from 10 to 1e+07 seconds, got -60"),
    ("--timeout 9.5", "--timeout must be from 10 to 1e+07 seconds, got 9.5"),
    ("--timeout .inf", "--timeout must be from 10 to 1e+07 seconds, got inf"),
    ("--timeout .nan", "--timeout must be from 10 to 1e+07 seconds, got nan"),
    ("--timeout soon", "timeout: expected float; got soon"),
    ("--name a/b", "--name is the name of a folder in runs, without slashes, got 'a/b'"),
    ("--name ..", "--name is the name of a folder in runs, without slashes, got '..'"),
    ("--name=", "--name is the name of a folder in runs, without slashes, got ''"),
    # local updates
    (
        "--trainer.callbacks+=LocalSGD",
        "LocalSGD needs several processes, whose weights it averages, and this run has one",
    ),
    ("--trainer.callbacks+=LocalSGD --trainer.callbacks.period 0", "LocalSGD: period must be at least 1 step, got 0"),
    ("--trainer.callbacks+=LocalSGD --trainer.callbacks.perid 2", "there is no option perid"),
    ("--trainer.callbacks+=LocalSGD --trainer.callbacks.outer adam", "expected one of 'nesterov'; got adam"),
    (
        "--model.local_losses.overlap 3",
        "local losses: overlap must be from 0 to 2, one less than there are stages",
    ),
    ("--model.local_losses.partition [layer9]", "SimCLRResNet has no module 'layer9'; it has conv1, bn1"),
    ("--model.local_losses.partition 9", "SimCLRResNet can be cut into 3 parts, not 9"),
    ("--model.local_losses.overlp 1", "model.local_losses"),
    ("--model.local_losses.overlap 1 --model.chunk_size 8", "model.chunk_size does not go with model.local_losses"),
    # sources
    (
        "--data.source nowhere",
        "no such folder; a source is a folder of images or arrays, torch/NAME, archive/NAME, hfds/PATH_OR_ID, "
        "wds/PATTERN, patches/FILE or textures",
    ),
    ("--data.source empty", "holds no image, nor do folders below it; images end in .jpg"),
    ("--data.source texturs", "no such folder; did you mean textures?"),
    ("--data.source hfds//nowhere", "hfds//nowhere: no folder /nowhere; after hfds/ comes a folder of parquet files"),
    ("--data.source torch/CIFAR11", "torch/CIFAR11"),
    # checkpoints
    ("--resume auto", "--resume auto needs --name: which run to continue"),
    ("--resume none.ckpt", "--resume none.ckpt: there is no such checkpoint; give 'auto' or a .ckpt file of a run"),
    ("--resume junk.ckpt", "junk.ckpt is truncated, or no checkpoint"),
    ("--resume other.ckpt", "other.ckpt was not written by simclr_scale: it has no entry 'simclr_scale'"),
]


@pytest.mark.parametrize(("options", "line"), OPTIONS)
def test_on_the_command_line(options: str, line: str, refusal: Refusal, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "junk.ckpt").write_bytes(os.urandom(100))
    torch.save({"conv1.weight": torch.ones(1)}, tmp_path / "other.ckpt")
    assert line in refusal(*QUICK, *options.split())


FILES = [
    ("model: [1, 2\n  x: {", "Problems parsing config: while parsing a flow sequence; line 1, column 8"),
    ("- a\n- b\n", "it holds no keys with values; --print_config shows what a file may hold"),
    ("quickstart", "it holds no keys with values; --print_config shows what a file may hold"),
    ("", "it holds no keys with values; --print_config shows what a file may hold"),
    ("modle: 3", "there is no option modle; did you mean model?"),
    ("model: {temprature: 0.1}", "there is no option model.temprature; did you mean model.temperature?"),
    ("model: {encoder: {init_args: {nme: resnet18}}}", "model.encoder: there is no option nme; did you mean name?"),
    ("model: {encoder: 3}", "model.encoder: Not a valid subclass of Module; got 3"),
    ("model: {encoder: {class_path: no.such.thing}}", "model.encoder: Problem with given class_path 'no.such.thing'"),
    (
        "model: {optimizer: {class_path: simclr_scale.optim.LARS, init_args: {lr: 0.1}}}",
        "model.optimizer: there is no option lr; did you mean model.learning_rate?",
    ),
    (
        "model: {optimizer: {class_path: simclr_scale.optim.LARS, init_args: {momentun: 0.1}}}",
        "model.optimizer: there is no option momentun; did you mean momentum?",
    ),
    ("data: {augmentation: {hew: 0.1}}", "data.augmentation has no field hew; --data.augmentation.help lists"),
    ("data: {global_batch_size: many}", "data.global_batch_size: expected int; got many"),
    ("model: {learning_rate: fast}", "model.learning_rate: expected float; got fast"),
    ("trainer: {accumulate_grad_batches: 4}", "trainer.accumulate_grad_batches 4 would not add negatives"),
]


@pytest.mark.parametrize(("text", "line"), FILES)
def test_in_a_file(text: str, line: str, refusal: Refusal, tmp_path: Path) -> None:
    (tmp_path / "my.yaml").write_text(text)
    assert line in refusal(*QUICK, "--config", "my.yaml")


def test_a_file_that_cannot_be_read_is_named(refusal: Refusal, tmp_path: Path) -> None:
    (tmp_path / "my.yaml").write_text("[]")
    assert refusal("pretrain", "--config", "my.yaml").startswith("my.yaml: it holds no keys")
    assert refusal("pretrain", "--config", "quickstrt") == (
        "there is no configuration file or recipe 'quickstrt'; did you mean quickstart?"
    )


def test_without_a_recipe(refusal: Refusal) -> None:
    assert refusal("pretrain") == (
        "the following arguments are required: model.encoder, data.source; a recipe has them: --config quickstart"
    )
    assert refusal("pretrain", "--config", "cifar10") == "the following arguments are required: data.source"


@pytest.mark.slow
def test_a_batch_that_does_not_divide_by_the_ranks(tmp_path: Path) -> None:
    ranks = ("--trainer.devices", 2, "--trainer.strategy", "ddp", "--trainer.accelerator", "cpu")
    outcome = start_command(*QUICK, *ranks, "--data.global_batch_size", 33, "--name", "x", cwd=tmp_path)
    assert (outcome.status, outcome.err) == (
        2,
        "simclr-scale pretrain: error: data.global_batch_size 33 does not divide by the 2 ranks; use 32\n",
    )
    assert list(tmp_path.iterdir()) == []


EVALUATIONS = [
    ("--data.src textures", "there is no option data.src; did you mean data.source?"),
    ("--data.source images", "the following arguments are required: encoder"),
    ("--encoder pixels:4", "the following arguments are required: data.source"),
    ("--encoder pixels:4 --data.source images --batch_size 0", "--batch_size must be at least 1, got 0"),
    ("--encoder pixels:4 --data.source images --batch_size few", "batch_size: expected int; got few"),
    ("--encoder pixels:4 --data.source images --data.num_workers=-1", "data.num_workers must be 0 or above, got -1"),
    ("--encoder pixels:4 --data.source images --data.seed=-1", "data.seed must be 0 or above, got -1"),
    ("--encoder pixels:4 --data.source images --device cud", "--device cud: Expected one of cpu, cuda"),
    ("--encoder pixels:4 --data.source images --device meta", "--device meta: "),
    (
        "--encoder pixels:4 --data.source images --output old.json",
        "old.json exists already; results are never overwritten",
    ),
    ("--encoder pixels:4 --data.source images --output no/m.json", "no/m.json: there is no folder no"),
    ("--encoder pixels:4 --data.source unlabelled", "unlabelled: has no labels"),
    ("--encoder pixels:4 --data.source nowhere", "no such folder; a source is a folder of images"),
    ("--encoder pixels:4 --data.source hfds//nowhere", "hfds//nowhere: no folder /nowhere"),
    ("--encoder pixels:0 --data.source images", "pixels:SIZE takes a whole number above 0, got '0'"),
    ("--encoder nothing --data.source images", "there is no encoder 'nothing'; give a run, a bundle or a .ckpt file"),
    ("--encoder junk.ckpt --data.source images", "junk.ckpt is truncated, or no checkpoint"),
    ("--encoder other.ckpt --data.source images", "other.ckpt was not written by simclr_scale"),
    ("--encoder images --data.source images", "images holds no encoder: neither config.json nor"),
]


@pytest.mark.parametrize("name", ["knn", "linear"])
@pytest.mark.parametrize(("options", "line"), EVALUATIONS)
def test_in_evaluations(name: str, options: str, line: str, refusal: Refusal, tmp_path: Path) -> None:
    (tmp_path / "junk.ckpt").write_bytes(os.urandom(100))
    torch.save({"conv1.weight": torch.ones(1)}, tmp_path / "other.ckpt")
    (tmp_path / "old.json").write_text("mine")
    write_images(tmp_path / "images", "a", "b", count=5)
    write_images(tmp_path / "unlabelled", count=5)
    assert line in refusal(name, *options.split())


def test_settings_of_one_evaluation(refusal: Refusal, tmp_path: Path) -> None:
    write_images(tmp_path / "images", "a", "b", count=5)
    what = ("--encoder", "pixels:4", "--data.source", "images")
    assert "at least 1" in refusal("knn", *what, "--k", 0)
    assert refusal("knn", *what, "--k", "5,many") == "--k 5,many: wanted whole numbers, such as 200 or 200,20,10"
    assert "k: 200, wanted at most 8, the labelled training images of images" in refusal("knn", *what)
    assert "above 0" in refusal("knn", *what, "--temperature", 0)
    assert "l2" in refusal("linear", *what, "--l2", -1)
    assert refusal("linear", *what, "--k", 3) == "there is no option k; --help lists all"


@pytest.mark.parametrize("name", ["knn", "linear"])
def test_a_cache_that_is_no_folder_and_classes_that_are_missing(name: str, refusal: Refusal, tmp_path: Path) -> None:
    write_images(tmp_path / "images" / "train", "a", "b", "c", count=5)
    write_images(tmp_path / "images" / "test", "a", "b", count=5)
    (tmp_path / "taken").touch()
    what = ("--encoder", "pixels:4", "--data.source", "images", "--data.num_workers", 0)
    options = ("--k", 3) if name == "knn" else ("--l2", 1)
    assert "5 of 15 training images are of classes that have no test image (c)" in refusal(name, *what, *options)
    options += ("--allow_missing_classes", "true", "--cache", "taken")
    assert re.search(r"the cache taken\S+ cannot be written \(Not a directory\)", refusal(name, *what, *options))


def test_an_encoder_whose_weights_are_of_another_architecture(refusal: Refusal, run: Path) -> None:
    file = run / "encoder" / "config.json"
    config = json.loads(file.read_text())
    config["model_args"]["channels"] = [8, 32, 96]
    file.write_text(json.dumps(config))
    before = files_below(run)
    for spec in (run, run / "encoder"):
        message = refusal("knn", "--encoder", spec, "--data.source", "textures")
        assert re.match(
            r"bundle runs/x/encoder: the weights do not fit the architecture 'simclr_resnet_tiny': '.* is \(", message
        )
    assert files_below(run) == before


def test_a_run_is_never_overwritten(refusal: Refusal, run: Path) -> None:
    assert refusal(*QUICK, "--name", "x") == (
        "run runs/x exists already; give another --name, or continue it with --resume auto"
    )
