"""What a user holds: activation and error rounding of a module; each other file serves this one."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Literal

import torch
from torch import nn

from lightning_lpsgld.casting.calls import Scope
from lightning_lpsgld.casting.cast import Caster
from lightning_lpsgld.casting.draws import ForwardCounter, Rounding
from lightning_lpsgld.casting.heads import HeadCasts
from lightning_lpsgld.casting.hooks import FunctionalMode, add_hooks, remove_hooks
from lightning_lpsgld.casting.session import Session
from lightning_lpsgld.casting.sites import ModuleRule, Site, find_sites
from lightning_lpsgld.formats import FormatLike, parse_format
from lightning_lpsgld.ops.dispatch import BackendName

__all__ = ["ActivationCasting"]


class ActivationCasting:
    r"""Round the outputs of a module's layers, and the errors that flow back through them.

    At every site the output x is replaced by :math:`Q_A(x)` and the gradient that comes back by :math:`Q_E(\bar x)`.
    Sites are convolution, linear, recurrent and attention layers and activation modules. Inside
    :meth:`forward_context` activations that are called as functions (``F.relu(x)``, ``x.relu()``, ``torch.tanh(x)``) in
    the ``forward`` of a module that holds layers are sites too. Not rounded are

    * the network's input;
    * the output of the network's last layer: whatever the outermost module returns that has passed nothing but views,
      activations and softmaxes since the last layer, in each of its outputs. Nothing is assumed about names or order;
    * losses and metrics (``torch.nn`` losses, ``torchmetrics``, any module without a layer inside), and what is
      computed outside of modules, unless it goes into another module;
    * softmax-like modules and functions, and the inside of attention (its module's output is a site), unless ``sites``
      names its output projection (a pattern that ends in ``out_proj``): then what the heads give is rounded, inside
      :meth:`forward_context`, with one exponent per token.

    The module's class, parameters, buffers and ``state_dict`` keys stay as they are, :meth:`remove` takes the hooks off
    again. A deep copy of an attached module is cast as well and shares the counter of draws.

    **Blocks.** Block formats have one exponent per index of dim 0: the sample. In a recurrent layer without
    ``batch_first`` dim 0 is time, in its final states it is the layer.

    **Draws.** Every forward call of an outermost module is one step and every cast within it one stream, so no draw is
    made twice; seeds are private to ``rank``. Calls in training mode with gradients count up in :meth:`state_dict`;
    others (evaluation, ``no_grad``) have draws of their own.

    **Memory.** With ``saved_activations="codes"`` autograd keeps rounded activations as codes and exponents (codes of
    fewer than 8 bits side by side), and of a ReLU the signs (in the same codes); gradients are bit-identical to those
    without. Only inside :meth:`forward_context`; what other layers save is left alone.

    **Compiling.** Under ``torch.compile`` (of the module, a part of it, or a LightningModule's steps) each cast, and
    each count of a forward, is one node of the graph, with the draws and results of an uncompiled forward; the graph
    stays whole and no step compiles anew. Inside :meth:`forward_context` the first forward of each mode runs
    uncompiled, to find the last layer; outside, that forward breaks its graph. Limits: the compiler hides
    ``torch.nn.functional.tanh``, ``sigmoid``, ``hardsigmoid`` and ``hardswish``, and ``torch.relu_`` and its like,
    which are not cast and named in a warning; ``saved_activations="codes"`` acts as ``"full"``, with a warning;
    activation checkpointing breaks the graph where it is inside of a compiled network, and raises in backward where it
    is around one; an output of one network that goes into another, both called outside of a common module, is not
    cast on its way.

    Where it stops: the first forward finds the last layer and holds a few more tensors than later ones. An in-place
    activation *module* rounds what it returns, not the tensor that it overwrote. Scripted and compiled submodules are
    named in a warning. A call of ``self.forward(x)`` instead of ``self(x)`` passes hooks by, and is warned of.

    Args:
        module: Any module; kept by weak reference.
        activations: Format of activations, ``None`` to leave them.
        errors: Format of errors, ``None`` to leave them.
        sites: Module types and name patterns to cast instead of the default; see
            :func:`lightning_lpsgld.casting.sites.find_sites`.
        exclude: Module types and name patterns to leave alone with all that is below them.
        functional: Whether activations that are called as functions are sites.
        seed: Seed of the draws.
        rank: Number of this process; each has draws of its own.
        eval_rounding: Rounding of activations outside training. ``"nearest"`` makes evaluation deterministic; the
            published code rounds stochastically there too.
        saved_activations: ``"full"`` or ``"codes"``.
        backend: For the ops.

    Raises:
        ValueError: If nothing would be cast, a rule matches nothing, or an option is unknown.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> casting = ActivationCasting(net, seed=7).attach()
        >>> with casting.forward_context():
        ...     net(torch.ones(3, 4)).sum().backward()
        >>> casting.state_dict()["forwards"], [site.name for site in casting.sites]
        (1, ['0', '1', '2'])
        >>> casting.remove()

    Reference:
        Yang et al., 2019 (SWALP), arXiv:1904.11943, algorithm 2;
        Zhang, Wilson & De Sa, 2022, arXiv:2206.09909, section 5.
    """

    def __init__(
        self,
        module: nn.Module,
        activations: FormatLike | None = "bfp8",
        errors: FormatLike | None = "bfp8",
        *,
        sites: Iterable[ModuleRule] | None = None,
        exclude: Iterable[ModuleRule] = (),
        functional: bool = True,
        seed: int = 0,
        rank: int = 0,
        eval_rounding: Rounding = "nearest",
        saved_activations: Literal["full", "codes"] = "full",
        backend: BackendName = "auto",
    ) -> None:
        if activations is None and errors is None:
            raise ValueError("ActivationCasting: `activations` and `errors` are both None, so nothing would be cast.")
        if eval_rounding not in ("nearest", "stochastic"):
            raise ValueError(f"`eval_rounding` must be 'nearest' or 'stochastic', got {eval_rounding!r}.")
        if saved_activations not in ("full", "codes"):
            raise ValueError(f"`saved_activations` must be 'full' or 'codes', got {saved_activations!r}.")
        codes = saved_activations == "codes"
        if codes and (activations is None or backend == "qtorch"):
            raise ValueError(
                f"saved_activations='codes' needs rounded activations and a backend that encodes, got "
                f"activations={activations!r}, backend={backend!r}. Use saved_activations='full'."
            )
        self._module = weakref.ref(module)
        self._plan = find_sites(module, sites if sites is None else list(sites), list(exclude))
        self._functional = functional
        formats = [None if fmt is None else parse_format(fmt) for fmt in (activations, errors)]
        caster = Caster(formats[0], formats[1], backend)
        self._session = Session(caster, ForwardCounter(seed, rank, eval_rounding), codes)
        self._session.root = self._module
        heads = HeadCasts(self._session, self._plan.heads)
        self._mode = FunctionalMode(self._session, heads)  # one for all forwards: compiled graphs are guarded by it

    @property
    def sites(self) -> tuple[Site, ...]:
        """Submodules whose output is cast (one of them may turn out to be the network's last layer)."""
        return tuple(self._plan.sites.values())

    @property
    def attached(self) -> bool:
        """Whether the hooks are on."""
        return self._session.active

    def _scopes(self) -> dict[str, Scope]:
        scopes: dict[str, Scope] = dict.fromkeys(self._plan.containers, "container")
        scopes.update(dict.fromkeys(self._plan.excluded, "excluded"))
        scopes.update({name: site.kind for name, site in self._plan.sites.items()})
        return scopes

    def attach(self) -> ActivationCasting:
        """Put the hooks on, in place. Does nothing if they are on.

        Returns:
            self.

        Raises:
            ReferenceError: If the module is gone.
        """
        module = self._module()
        if module is None:
            raise ReferenceError("ActivationCasting: the module that it was made for no longer exists.")
        if self._session.active:
            return self
        for name, reason in self._plan.opaque.items():
            warnings.warn(f"Activation casting cannot see all of {name or 'the module'!r}: {reason}.", stacklevel=2)
        self._session.shield()
        for name, scope in self._scopes().items():
            add_hooks(module.get_submodule(name), self._session, name, scope)
        self._session.active = True
        return self

    def remove(self) -> None:
        """Take the hooks off; the module is again as it was. Deep copies of it stop casting too."""
        self._session.active = False
        self._session.reset()
        module = self._module()
        if module is not None:
            remove_hooks(module, self._session)

    @contextmanager
    def forward_context(self) -> Iterator[None]:
        """Enter around each forward: catches functional activations and, if asked for, keeps codes for backward."""
        session = self._session
        if not session.active or session.in_context:
            yield
            return
        session.reset()
        session.shield()
        session.in_context = True
        with ExitStack() as stack:
            stack.callback(session.end_context)
            if session.graphs.shielded is not None and not session.knows_outputs():
                stack.enter_context(torch.compiler.set_stance("force_eager"))  # finding them cannot be compiled
            session.caster.watched = self._functional and not self._plan.opaque
            if self._functional:
                stack.enter_context(self._mode)
            if session.saved is not None and torch.is_grad_enabled():
                session.packing = session.caster.carrying = True
                hooks = torch.autograd.graph.saved_tensors_hooks(session.saved.pack, session.saved.unpack)
                stack.enter_context(hooks)
            yield

    def state_dict(self) -> dict[str, Any]:
        """Everything that shifts the next draw: the counters, and where the network's outputs were found."""
        return {**self._session.counter.state_dict(), "outputs": self._session.tracker.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what :meth:`state_dict` returned."""
        self._session.caster.offer_again()
        self._session.counter.load_state_dict(state)
        self._session.tracker.load_state_dict(state["outputs"])

    def describe(self) -> list[dict[str, str]]:
        """One row per site: name, type, formats; functions and the last layers appear once a forward has run."""
        session = self._session
        formats = {"activation": str(session.caster.activations), "error": str(session.caster.errors)}
        outputs = {site for _, site, _ in session.tracker.places}
        rows = [(site.name, site.type_name) for site in self.sites]
        rows += [(name, "function") for name in session.functional_sites]
        return [
            {"name": name, "type": kind, **(dict.fromkeys(formats, "output") if name in outputs else formats)}
            for name, kind in rows
        ]
