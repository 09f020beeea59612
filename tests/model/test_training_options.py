"""Precision, micro-batches, recomputation, averages and objectives of the trainer, each against plain arithmetic."""

from __future__ import annotations

import copy
import threading
from dataclasses import replace
from typing import Any

import pytest
import torch
from dit_moe_kernels import current_backend, use_backend
from torch import Tensor

from dit_moe import DiT
from dit_moe.training import Trainer, TrainingReport

from .training_cases import CONFIG, SETTINGS, assert_equal, bars, shaken, trainer, weights

PLAIN = replace(SETTINGS, warmup_steps=0, schedule="constant", grad_clip=1e9)


def seen_by(run: Trainer) -> list[tuple[Tensor, Tensor, Tensor]]:
    """What the model is called with, in this list."""
    seen: list[tuple[Tensor, Tensor, Tensor]] = []
    run.model.register_forward_pre_hook(lambda module, args: seen.append(tuple(arg.clone() for arg in args)))
    return seen


def losses_of(settings: Any, config: Any = CONFIG, steps: int = 12) -> list[float]:
    reports: list[TrainingReport] = []
    shaken(trainer(settings, config)).run(until=steps, report_every=1, on_report=reports.append)
    return [report.loss for report in reports]


# ---- precision


def test_bf16_weights_follow_fp32_masters() -> None:
    """The masters take AdamW's steps in fp32, here written out from the bf16 gradients; the model rounds them."""
    run = shaken(trainer(replace(PLAIN, dtype="bf16-weights", learning_rate=1e-5)))
    assert {param.dtype for param in run.model.parameters()} == {torch.bfloat16}
    masters = {name: weight.clone() for name, weight in run.optimizer.weights.items()}
    assert {weight.dtype for weight in masters.values()} == {torch.float32}
    start = {name: param.detach().clone() for name, param in run.parameters.items()}
    gradients: list[dict[str, Tensor]] = []
    step = run.optimizer.step

    def spy(*args: Any, **kwargs: Any) -> None:
        gradients.append({name: grad.float().clone() for name, grad in run.optimizer.gradients().items()})
        step(*args, **kwargs)

    run.optimizer.step = spy  # type: ignore[method-assign]
    run.run(until=3)
    for name, weight in masters.items():
        first, second = torch.zeros_like(weight, dtype=torch.float64), torch.zeros_like(weight, dtype=torch.float64)
        expected = weight.double()
        for count, grads in enumerate(gradients, start=1):
            first = 0.9 * first + 0.1 * grads[name].double()
            second = 0.999 * second + 0.001 * grads[name].double() ** 2
            update = (first / (1 - 0.9**count)) / ((second / (1 - 0.999**count)).sqrt() + 1e-8)
            expected = expected - 1e-5 * update
        torch.testing.assert_close(run.optimizer.weights[name].double(), expected, rtol=1e-6, atol=1e-7)
        assert torch.equal(run.parameters[name], run.optimizer.weights[name].bfloat16())
    # Three steps of 1e-5 hardly show in bf16 weights, whose masters all moved.
    name = "blocks.0.moe.experts.w2"
    assert (run.parameters[name] == start[name]).float().mean() > 0.5
    assert (run.optimizer.weights[name] != masters[name]).all()


def test_stochastic_weights_move_on_average_without_masters() -> None:
    """A step of 1e-5 is far below bf16's distances near 0.1; in 200 equal ones the weights move by 2e-3 on average."""
    run = trainer(replace(PLAIN, dtype="bf16-stochastic", learning_rate=1e-5, steps=10**6))
    assert all(run.optimizer.weights[name] is param for name, param in run.parameters.items())
    name = "blocks.0.moe.experts.w13"
    param = run.parameters[name]
    with torch.no_grad():
        param.fill_(0.1)
    start = param[0, 0, 0].item()
    for _ in range(200):
        run.optimizer.zero_gradients()
        param.grad = torch.ones_like(param)
        run.optimizer.step(1e-5)
    assert param.dtype == torch.bfloat16
    assert start - param.float().mean().item() == pytest.approx(2e-3, rel=0.05)


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "bf16-weights", "bf16-stochastic"])
def test_model_on_the_meta_device_gets_fresh_weights(dtype: str) -> None:
    with torch.device("meta"):
        model = DiT(CONFIG)
    run = Trainer(model, bars(), replace(SETTINGS, dtype=dtype))
    run.run(until=2)
    weight = run.parameters["blocks.0.attn.qkv.weight"]
    assert weight.device.type == "cpu" and weight.isfinite().all() and weight.float().std() > 0.05
    expected = DiT(CONFIG).pos_embed
    torch.testing.assert_close(run.model.pos_embed.float(), expected, rtol=0, atol=4e-3)


def test_masters_start_from_the_exact_weights() -> None:
    exact, rounded = trainer(), trainer(replace(SETTINGS, dtype="bf16-weights"))
    assert_equal(exact.optimizer.weights, rounded.optimizer.weights)


@pytest.mark.parametrize(
    "options", [{"dtype": "bf16"}, {"dtype": "bf16-weights"}, {"dtype": "bf16-stochastic"}, {"moments": "bf16"}]
)
def test_losses_of_each_precision_agree(options: dict[str, Any]) -> None:
    exact, other = losses_of(SETTINGS), losses_of(replace(SETTINGS, **options))
    assert exact != other
    assert other == pytest.approx(exact, rel=0.03)


def test_saved_weights_of_each_precision_are_fp32() -> None:
    run = trainer(replace(SETTINGS, dtype="bf16-weights", ema_dtype="bf16"))
    run.run(until=3)
    state = run.state()
    assert {tensor.dtype for name, tensor in state.items() if name.startswith("optimizer")} == {torch.float32}
    assert state["model.blocks.0.attn.qkv.weight"].dtype == torch.float32
    assert {param.dtype for param in run.averaged_model().parameters()} == {torch.float32}


@pytest.mark.parametrize(
    "options",
    [
        {"dtype": "bf16-weights"},
        {"dtype": "bf16-weights", "moments": "bf16", "ema_dtype": "bf16", "micro_batches": 2},
        {"ema_device": "cpu", "ema_every": 4, "ema_dtype": "bf16"},
        {"dtype": "bf16-stochastic", "moments": "bf16", "micro_batches": 2},
    ],
    ids=["masters", "bf16 states", "averages on the host", "no masters"],
)
def test_state_is_all_that_a_run_needs(options: dict[str, Any]) -> None:
    settings = replace(SETTINGS, **options)
    whole, broken, again = trainer(settings), trainer(settings), shaken(trainer(settings))
    whole.run()
    broken.run(until=5)
    again.load_state(weights(broken), 5)
    again.run()
    assert_equal(weights(whole), weights(again))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"dtype": "fp32"}, 16),
        ({"dtype": "bf16"}, 16),
        ({"dtype": "bf16-weights"}, 18),
        ({"dtype": "bf16-weights", "ema_device": "cpu"}, 18),
        ({"dtype": "bf16-weights", "moments": "bf16", "ema_dtype": "bf16"}, 12),
        ({"dtype": "bf16-stochastic", "moments": "bf16"}, 10),
        ({"dtype": "bf16-stochastic", "moments": "bf16", "ema_dtype": "bf16"}, 8),
    ],
)
def test_bytes_of_a_parameter(options: dict[str, Any], expected: int) -> None:
    """The table in docs/training.md, without the gradient: weights, masters, moments and averages."""
    run = trainer(replace(SETTINGS, **options))
    held = {tensor.data_ptr(): tensor.nbytes for tensor in [*run.state().values(), *run.model.parameters()]}
    other = run.model.pos_embed.nbytes + run.optimizer.updates.nbytes
    assert (sum(held.values()) - other) / sum(p.numel() for p in run.parameters.values()) == expected


# ---- micro-batches


@pytest.mark.parametrize("dtype", ["fp32", "bf16-weights"])
def test_micro_batches_sum_to_the_batch(dtype: str) -> None:
    """Without the balance loss, which is that of a micro-batch, one step is the same however the batch is cut."""
    config = replace(CONFIG, balance_alpha=0.0)
    runs = [shaken(trainer(replace(PLAIN, dtype=dtype, micro_batches=parts), config)) for parts in (1, 4)]
    seen = [seen_by(run) for run in runs]
    for run in runs:
        run.train_step()
    assert [len(calls) for calls in seen] == [1, 4]
    for index in range(3):  # the same images, times and classes
        assert torch.equal(seen[0][0][index], torch.cat([call[index] for call in seen[1]]))
    reports = [run.report() for run in runs]
    rel = 1e-5 if dtype == "fp32" else 0.02
    assert reports[1].loss == pytest.approx(reports[0].loss, rel=rel)
    assert reports[1].grad_norm == pytest.approx(reports[0].grad_norm, rel=rel)
    assert reports[1].expert_load == reports[0].expert_load


def test_balance_loss_does_not_grow_with_the_micro_batches() -> None:
    """Each micro-batch has its own balance loss; a step takes their mean, in the report and in the gradient."""
    run = shaken(trainer(replace(PLAIN, micro_batches=4), replace(CONFIG, balance_alpha=0.5)))
    plain, seen = copy.deepcopy(run.model), seen_by(run)
    for name, param in plain.named_parameters():
        param.requires_grad_("gate" in name)
    gradients: dict[str, Tensor] = {}
    run.optimizer.zero_gradients = lambda: gradients.update(  # type: ignore[method-assign]
        {name: grad.clone() for name, grad in run.optimizer.gradients().items()}
    )
    plain.train()
    plain.y_embedder.eval()
    run.train_step()
    balances = []
    for x, t, y in seen:
        output, aux = plain(x, t, y, return_aux=True)
        balances.append(aux.balance_loss)
    assert run.report().balance_loss == pytest.approx(torch.stack(balances).mean().item(), rel=1e-5)
    # The loss's part of the gate's gradient does not depend on alpha: two runs differ by the balance loss's part.
    other = shaken(trainer(replace(PLAIN, micro_batches=4), replace(CONFIG, balance_alpha=0.0)))
    without: dict[str, Tensor] = {}
    other.optimizer.zero_gradients = lambda: without.update(  # type: ignore[method-assign]
        {name: grad.clone() for name, grad in other.optimizer.gradients().items()}
    )
    other.train_step()
    torch.stack(balances).mean().backward()
    name = "blocks.1.moe.gate.weight"
    expected = dict(plain.named_parameters())[name].grad
    torch.testing.assert_close(gradients[name] - without[name], expected, rtol=1e-3, atol=1e-6)


# ---- recomputation


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "bf16-weights"])
def test_recomputation_changes_no_bit(dtype: str) -> None:
    runs = [shaken(trainer(replace(SETTINGS, dtype=dtype, recompute_blocks=count))) for count in (0, 1, 2)]
    for run in runs:
        run.run(until=3)
    assert_equal(weights(runs[0]), weights(runs[1]))
    assert_equal(weights(runs[0]), weights(runs[2]))


def test_recomputation_keeps_less() -> None:
    kept = []
    for count in (0, 2, 4):
        run = trainer(replace(SETTINGS, recompute_blocks=count), replace(CONFIG, depth=4))
        sizes: dict[int, int] = {}
        with torch.autograd.graph.saved_tensors_hooks(
            lambda tensor, sizes=sizes: sizes.__setitem__(tensor.data_ptr(), tensor.nbytes) or tensor, lambda x: x
        ):
            run.train_step()
        kept.append(sum(sizes.values()))
    assert kept[0] > 1.3 * kept[1] > 1.5 * kept[2]


def test_recomputation_runs_on_the_backend_of_its_forward() -> None:
    """A GPU's backward pass has a thread of its own, where a use_backend() around the step does not hold."""
    run = trainer(replace(SETTINGS, recompute_blocks=1))
    seen: list[str] = []
    run.model.blocks[-1].moe.register_forward_pre_hook(lambda module, args: seen.append(current_backend()))
    with use_backend("reference"):
        loss = run.model(torch.randn(2, 1, 8, 8), torch.rand(2), torch.zeros(2, dtype=torch.long)).sum()
    backward = threading.Thread(target=loss.backward)
    backward.start()
    backward.join()
    assert seen == ["reference", "reference"]


def test_recomputation_checks_and_ends() -> None:
    with pytest.raises(ValueError, match="recompute_blocks: got 3, expected 0 to the model's 2 blocks"):
        trainer(replace(SETTINGS, recompute_blocks=3))
    run = trainer(replace(SETTINGS, recompute_blocks=1))
    assert [type(block).__name__ for block in run.model.blocks] == ["DiTBlock", "RecomputedDiTBlock"]
    again = copy.deepcopy(run.model)
    Trainer(again, run.data, SETTINGS)
    assert [type(block).__name__ for block in again.blocks] == ["DiTBlock", "DiTBlock"]


# ---- averages


@pytest.mark.parametrize("device", ["model", "cpu"])
def test_averages_every_few_steps(device: str) -> None:
    """Updates every third step take the decay of three steps."""
    run = shaken(trainer(replace(SETTINGS, ema_every=3, ema_decay=0.3, ema_device=device)))
    name = "blocks.0.attn.qkv.weight"
    expected = run.optimizer.weights[name].clone()
    for step in range(7):
        run.train_step()
        if step % 3 == 2:
            share = 1.0
            for past in range(step - 2, step + 1):
                share *= min(0.3, (1 + past) / (10 + past))
            expected = share * expected + (1 - share) * run.optimizer.weights[name]
        torch.testing.assert_close(run.averages.tensors[name], expected, rtol=1e-5, atol=1e-7)


def test_bf16_averages_move_on_average() -> None:
    """Rounded to the nearest, an average of decay 0.999 would not move at all in bf16."""
    settings = replace(PLAIN, ema_decay=0.999, ema_dtype="bf16", steps=10**6)
    run = trainer(settings)
    weight, average = run.optimizer.weights, run.averages
    name = "blocks.0.moe.experts.w13"
    with torch.no_grad():
        weight[name].fill_(1.01)
        average.tensors[name].fill_(1.0)
    for step in range(1, 501):
        average.update(step, [0.999])
    expected = 1.01 - 0.01 * 0.999**500
    assert average.tensors[name].float().mean().item() == pytest.approx(expected, abs=3e-4)


# ---- objectives


def test_ddpm_trains_noise_at_steps_of_a_thousand() -> None:
    run = shaken(trainer(replace(PLAIN, objective="ddpm"), replace(CONFIG, class_dropout_prob=0.0)))
    plain, seen = copy.deepcopy(run.model), seen_by(run)
    run.train_step()
    ((x_t, t, y),) = seen
    assert torch.equal(t, t.round()) and 0 <= t.min() and t.max() <= 999 and len(set(t.tolist())) > 4
    alpha_bar = torch.cumprod(1 - torch.linspace(1e-4, 2e-2, 1000, dtype=torch.float64), 0)[t.long()].view(-1, 1, 1, 1)
    column = torch.arange(8).view(1, 1, 1, 8)
    x = torch.where((column >= 4) == (y.view(-1, 1, 1, 1) == 1), 1.0, -1.0).expand_as(x_t)
    noise = (x_t - alpha_bar.sqrt() * x) / (1 - alpha_bar).sqrt()
    assert abs(noise.std() - 1) < 0.15
    expected = (plain(x_t, t, y) - noise).square().mean()
    assert run.report().loss == pytest.approx(expected.item(), rel=1e-4)


def test_ddpm_trains_the_variance_of_models_that_have_one() -> None:
    run = shaken(trainer(replace(PLAIN, objective="ddpm"), replace(CONFIG, learn_sigma=True)))
    bias = run.parameters["final_layer.linear.bias"]
    before = bias.detach().clone()
    run.train_step()
    moved = (bias != before).view(16, 2)  # of each pixel of a patch, the noise and the variance
    assert moved.all()


def test_dropped_classes_follow_the_image() -> None:
    """The same classes are dropped however the batch is cut, about as many as the model's configuration says."""
    config = replace(CONFIG, class_dropout_prob=0.4)
    labels = []
    for parts in (1, 2):
        run = trainer(replace(SETTINGS, micro_batches=parts, steps=40), config)
        seen = seen_by(run)
        run.run()
        labels.append(torch.cat([y for _, _, y in seen]))
    assert torch.equal(*labels)
    assert abs((labels[0] == 2).float().mean() - 0.4) < 0.1
