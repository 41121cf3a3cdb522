"""Adam for an SAE, with its tables' gradients in factors, and the decoder's unit norm folded in."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version
from torch.optim.adam import adam

from csae.config import LOOK_BACK_LR
from csae.factors import Factors, Gradients
from csae.ops.adam_rows import Pairs, Table, adam_numbers, adam_rows, sort_pairs
from csae.rounded import Copies
from csae.sae import SAE
from csae.tables import TABLES

MOMENTS = (torch.float32, torch.bfloat16)


class Adam(torch.optim.Optimizer):
    """Adam (Kingma and Ba 2015, arXiv 1412.6980) as `torch.optim.Adam` has it, for the parameters of an SAE.

    Rows of W_dec keep unit norm: the part of the gradient along a row is removed before the step, and the row is
    normalised after it.

        losses, gradients = sae.gradients(acts)
        optimizer.update(gradients)

    takes the gradients of the tables in factors: no tensor of a table's size is made, and each parameter and
    moment passes through memory once. The usual `losses.loss.backward(); optimizer.step()` does the same step
    from dense gradients.

    Args:
        sae: whose parameters to train; on the device that it will train on.
        lr: learning rate; may be a scalar tensor on that device, which a captured or compiled step then reads.
        look_back_lr: learning rate of a contextual SAE's look-back, as a share of lr. The look-back's parameters are
            a parameter group of their own, and each group knows its `share`.
        betas: Adam's.
        eps: Adam's, with the value of Gao et al. 2024 (arXiv 2406.04093): gradients of the fvu are small numbers.
        lazy: `torch.optim.SparseAdam` for the tables: a feature that did not fire stays as it is, with its moments,
            and costs nothing. This is not Adam: features that rarely fire move less.
        moments: dtype of the tables' moments: float32, or bfloat16 with stochastic rounding, for half the memory.

    copies: the tables in bfloat16 (`csae.rounded`). On CUDA, under bfloat16 autocast, a step casts no table where it is

        with optimizer.copies.used(), torch.autocast("cuda", torch.bfloat16):
            losses, gradients = sae.gradients(acts)
        optimizer.update(gradients)

    with the same results: the copy of a table that was written by anyone else since is not taken. Not for a loop that
    writes to tables through `.data` in place, which can't be seen.

    State of each parameter: step, exp_avg, exp_avg_sq. A parameter without a gradient stays as it is and counts no
    step, as in torch. So does one that is frozen (requires_grad=False), whatever its gradient.

    Each step raises ValueError or TypeError where the SAE's parameters are no longer those that the optimizer was made
    for (replaced, in another dtype or on another device), and where gradients are of another SAE.
    """

    @torch.compiler.disable  # torch's own __init__ breaks the graph, and what was set before is lost
    def __init__(
        self,
        sae: SAE,
        lr: float | Tensor = 1e-3,
        look_back_lr: float = LOOK_BACK_LR,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 6.25e-10,
        lazy: bool = False,
        moments: torch.dtype = torch.float32,
    ) -> None:
        if not isinstance(sae, SAE):
            raise TypeError(f"sae: given a {type(sae).__name__}; needed a TopKSAE or a ContextualSAE")
        for name, value in (("lr", lr), ("look_back_lr", look_back_lr), ("eps", eps)):
            if not 0 <= value < float("inf"):
                raise ValueError(f"{name}: given {value}; needed a number of zero or more")
        if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"betas: given {betas}; needed two numbers from 0 to below 1")
        if moments not in MOMENTS:
            raise ValueError(f"moments: given {moments}; needed torch.float32 or torch.bfloat16")
        for name, parameter in sae.named_parameters():
            _check_dtype(name, parameter)
        self.sae = sae
        self.names: dict[Tensor, str] = {weight: name for name, weight in sae.named_parameters()}
        look_back = [parameter for parameter, name in self.names.items() if name in sae.look_back]
        others = [parameter for parameter, name in self.names.items() if name not in sae.look_back]
        groups = [
            {"params": others, "lr": lr, "share": 1.0},
            {"params": look_back, "lr": lr * look_back_lr, "share": look_back_lr},
        ]
        super().__init__([group for group in groups if group["params"]], {"betas": betas, "eps": eps})
        self.lazy, self.moments = lazy, moments
        self.copies = Copies()
        self._constants: dict[tuple[Any, ...], Tensor] = {}  # of `_numbers`
        self._apart: set[str] | None = set()  # parameters that have counted fewer steps than the rest of their group
        for weight, name in self.names.items():
            dtype = moments if name in TABLES else torch.float32
            self.state[weight] = {
                "step": torch.zeros((), device=weight.device),
                "exp_avg": torch.zeros_like(weight, dtype=dtype),
                "exp_avg_sq": torch.zeros_like(weight, dtype=dtype),
            }

    def __getstate__(self) -> dict[str, Any]:
        own = ("sae", "names", "lazy", "moments", "_apart", "_constants", "copies")  # torch copies only its own
        return super().__getstate__() | {name: vars(self)[name] for name in own if name in vars(self)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)  # in the dtype of the parameters
        for parameter, state in self.state.items():
            state["step"] = state["step"].to(parameter.device)  # torch leaves it where it was saved from
            if self.names[parameter] in TABLES:
                state |= {key: state[key].to(self.moments) for key in ("exp_avg", "exp_avg_sq")}
        self.forget_steps()

    def forget_steps(self) -> None:
        """Read again from `state` how many steps each parameter has counted: call this after writing to `state`."""
        self._apart = None

    def marks(self) -> tuple[Hashable, ...]:
        """What a captured `update` depends on beside gradients and learning rates: a replay needs the same again."""
        tensors = [*self.names, *(of for state in self.state.values() for of in state.values())]
        copies = self.copies.current()
        return (
            tuple((of.data_ptr(), of.requires_grad) for of in tensors),
            tuple((name, of.data_ptr()) for name, of in copies.items()),
            tuple((group["betas"], group["eps"]) for group in self.param_groups),
            None if self._apart is None else frozenset(self._apart),
        )

    def replayed(self) -> None:
        """Say that a captured `update` ran again: each tensor counts a write, as if it had run by itself."""
        copies = self.copies.current()  # a replay writes those that it takes
        written = [*self.names, *copies.values(), *(of for state in self.state.values() for of in state.values())]
        increment_version(written)
        for name in copies:
            self.copies.written(name)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step from the parameters' `grad`; a parameter without one stays as it is."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.update({name: p.grad for p, name in self.names.items() if p.grad is not None})
        return loss

    @torch.no_grad()
    def update(self, gradients: Gradients | dict[str, Tensor | Factors]) -> None:
        """One step from what `SAE.gradients` gave; a parameter without a gradient, or frozen, stays as it is."""
        self._check(gradients)
        if self._apart is None:
            self._apart = {name for group in self.param_groups for name in self._others_than_most(group["params"])}
        for group in self.param_groups:
            states = {self.names[parameter]: self.state[parameter] for parameter in group["params"]}
            parameters = {self.names[parameter]: parameter for parameter in group["params"]}
            given = [name for name, parameter in parameters.items() if name in gradients and parameter.requires_grad]
            if not given:
                continue
            self._apart.update(parameters.keys() - set(given))
            dense = [name for name in given if name not in TABLES]
            if dense:  # _adam counts their steps
                _adam([(parameters[name], gradients[name], states[name]) for name in dense], group)
            tables = [name for name in TABLES if name in given]
            if tables:
                torch._foreach_add_([states[name]["step"] for name in tables], 1)
            together = [name for name in tables if name not in self._apart]
            for names in (together, *([name] for name in tables if name in self._apart)):
                if names:
                    self._step_tables(names, parameters, states, gradients, group)

    def _step_tables(
        self,
        names: list[str],
        parameters: dict[str, Tensor],
        states: dict[str, dict[str, Tensor]],
        gradients: dict[str, Tensor | Factors],
        group: dict[str, Any],
    ) -> None:
        """One step of tables that have counted the same steps."""
        hyper, seed = self._numbers(group, states[names[0]]["step"])
        first_row = 0 if self.sae.shard is None else self.sae.shard.rows.start
        copied: list[str] = []
        shared: dict[int, tuple[Pairs, list[Table]]] = {}  # tables with the same pairs, by the pairs' id
        for name in names:
            given, state = gradients[name], states[name]
            # b_enc is a table of width one.
            param, exp_avg, exp_avg_sq = (
                tensor if tensor.dim() == 2 else tensor.unsqueeze(1)
                for tensor in (parameters[name], state["exp_avg"], state["exp_avg_sq"])
            )
            own = given if isinstance(given, Factors) else _whole(given.view(param.shape), self.lazy)
            copy = self.copies.to_write(name, parameters[name], whole=not self.lazy)
            if copy is not None:
                copied.append(name)
                copy = copy.view(param.shape)
            table = Table(param, exp_avg, exp_avg_sq, own.weights, own.rows, name == "W_dec", copy)
            shared.setdefault(id(own.pairs), (own.pairs, []))[1].append(table)
        for pairs, tables in shared.values():
            adam_rows(pairs, tables, hyper, seed, self.lazy, first_row)
        for name in copied:
            self.copies.written(name)

    def _numbers(self, group: dict[str, Any], step: Tensor) -> tuple[Tensor, Tensor]:
        """The numbers that `adam_rows` takes, and its seed. SparseAdam, of a lazy step, doesn't correct eps.

        Each is factor * (1 - base^t)^power, and the first also times lr. With base 0 nothing is left of t.
        """
        (beta1, beta2), eps = group["betas"], group["eps"]
        key = beta1, beta2, eps, self.lazy, step.device
        if key not in self._constants:
            eps_base, eps_power = (beta2, -0.5) if self.lazy else (0, 1)
            factors, rest = [1, 1, eps, 1 - beta1, beta2, 1 - beta2], [0, 0, 0]
            constants = [factors, [beta1, beta2, eps_base, *rest], [-1, -0.5, eps_power, 1, 1, 1]]
            self._constants[key] = torch.tensor(constants, dtype=torch.float64, device=step.device)
        return adam_numbers(self._constants[key], step, group["lr"])

    def _check(self, gradients: dict[str, Tensor | Factors]) -> None:
        of = getattr(gradients, "of", None)
        if of is not None and of is not self.sae:
            raise ValueError("gradients: of another SAE than the optimizer was made for; needed those of the same")
        now = dict(self.sae.named_parameters())
        for name in gradients.keys() - set(self.names.values()):
            raise ValueError(f"gradients: given one of {name}; needed those of {', '.join(self.names.values())}")
        for parameter, name in self.names.items():
            if now.get(name) is not parameter:
                raise ValueError(
                    f"sae: its {name} is not the one that the optimizer was made for; needed an optimizer made since"
                )
            _check_dtype(name, parameter)
            if parameter.device != self.state[parameter]["exp_avg"].device:
                raise ValueError(
                    f"sae: {name} is on {parameter.device}, its moments on {self.state[parameter]['exp_avg'].device}; "
                    "needed an optimizer made after the SAE was moved"
                )
            gradient = gradients.get(name)
            if isinstance(gradient, Tensor):
                if gradient.shape != parameter.shape:  # the fused kernel would read past its end
                    raise ValueError(
                        f"gradients: given {name} of shape {list(gradient.shape)}; needed {list(parameter.shape)}"
                    )
                if gradient.dtype != parameter.dtype or gradient.device != parameter.device:
                    raise TypeError(
                        f"gradients: given {name} in {gradient.dtype} on {gradient.device}; needed {parameter.dtype} "
                        f"on {parameter.device}"
                    )

    def _others_than_most(self, parameters: list[Tensor]) -> set[str]:
        """Which of a group's parameters have counted fewer steps than another one."""
        steps = {self.names[parameter]: int(self.state[parameter]["step"]) for parameter in parameters}
        return {name for name, count in steps.items() if count < max(steps.values())}


def _check_dtype(name: str, parameter: Tensor) -> None:
    if parameter.dtype != torch.float32:
        raise TypeError(f"sae: given {name} in {parameter.dtype}; needed torch.float32: call sae.float() first")


def _adam(given: list[tuple[Tensor, Any, dict[str, Tensor]]], group: dict[str, Any]) -> None:
    """One step of Adam on dense parameters, each with its gradient and its state, in place."""
    parameters, gradients, states = zip(*given, strict=True)
    exp_avgs, exp_avg_sqs, steps = ([state[name] for state in states] for name in ("exp_avg", "exp_avg_sq", "step"))
    beta1, beta2 = group["betas"]
    compiling = torch.compiler.is_compiling()  # a compiler can't trace the fused kernel, and fuses by itself
    if not compiling:
        increment_version([*parameters, *exp_avgs, *exp_avg_sqs])  # the fused kernel counts no writes
    adam(
        list(parameters),
        [gradient.contiguous() for gradient in gradients],  # the fused kernel takes the parameters' strides for theirs
        exp_avgs,
        exp_avg_sqs,
        [],
        steps,
        fused=not compiling,
        capturable=compiling,
        amsgrad=False,
        beta1=beta1,
        beta2=beta2,
        lr=group["lr"],
        weight_decay=0,
        eps=group["eps"],
        maximize=False,
    )


def _whole(rows: Tensor, lazy: bool) -> Factors:
    """A dense gradient [n, d] in the form of factors: each row is its own token. lazy: without rows of zeros."""
    n = rows.shape[0]
    each = torch.arange(n, device=rows.device)
    if lazy:
        pairs = sort_pairs(torch.where((rows == 0).all(dim=1), n, each), each, n)
    else:
        pairs = Pairs(each, each, torch.arange(n + 1, device=rows.device))
    return Factors(pairs, torch.ones(n, device=rows.device), rows)
