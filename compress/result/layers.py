"""What happened to one layer, as plain data."""

from __future__ import annotations

from dataclasses import dataclass

from compress.plan import DENSE


@dataclass(frozen=True)
class MeasuredError:
    """Mean squared error per output element, and the same over the output's variance."""

    mse: float
    relative_mse: float | None = None


@dataclass(frozen=True)
class LayerErrors:
    """Measured errors of one layer: on which images, on which input.

    *Alone* feeds the layer its original input, *in place* what the compressed network feeds it.
    """

    fit_alone: MeasuredError | None = None
    fit_in_place: MeasuredError | None = None
    validation_alone: MeasuredError | None = None
    validation_in_place: MeasuredError | None = None


@dataclass(frozen=True)
class LayerResult:
    """One layer: what was chosen and why, what it saves, what it costs in error.

    Attributes:
        name: Qualified name in the original model.
        kind: Kind of layer, such as ``"Conv2d"``.
        shape: Text such as ``"64→64 3x3 s1"``.
        scheme: ``"dense"`` where the layer was kept.
        ranks: Ranks per group; ``()`` for dense, two for ``two_sided``, else one.
        width: Inputs and outputs that stayed where channels were taken out, else None; ``shape``
            begins with those of the whole layer. The scheme is ``"narrow"`` where nothing else
            happened.
        full_rank: First rank at which the scheme loses nothing; ``min(d, c_out)`` for dense.
        break_even: Largest rank that still saves; 0 where none does.
        reason: How the rank was chosen, or why the layer was kept.
        refitted: Whether the refit changed its weights; a dense layer may take part too.
        dense_bytes: Bytes of its parameters as saved; ``bytes`` those of its replacement.
        predicted_held_out_mse: The prediction on held-out rows, given where samples were few.
        predicted_loss: Predicted increase of the objective per image.
        measured_loss: Measured increase when only this layer is rewritten.
        eigenvalues: Spectrum that the cut was made in, descending, possibly truncated.
        eigenvalue_count: Length of the whole spectrum.
        samples: Rows the statistics were taken from.
        dense_seconds: Measured time of the original layer; ``seconds`` of its replacement.
    """

    name: str
    kind: str
    shape: str = ""
    scheme: str = DENSE
    ranks: tuple[int, ...] = ()
    full_rank: int | None = None
    break_even: int | None = None
    reason: str = ""
    refitted: bool = False
    dense_macs: int = 0
    macs: int = 0
    dense_params: int = 0
    params: int = 0
    dense_bytes: int | None = None
    bytes: int | None = None
    predicted_mse: float | None = None
    predicted_relative_mse: float | None = None
    predicted_held_out_mse: float | None = None
    predicted_loss: float | None = None
    measured_loss: float | None = None
    errors: LayerErrors = LayerErrors()
    eigenvalues: tuple[float, ...] = ()
    eigenvalue_count: int | None = None
    samples: int | None = None
    samples_per_dimension: float | None = None
    dense_seconds: float | None = None
    seconds: float | None = None
    width: tuple[int, int] | None = None

    @property
    def rewritten(self) -> bool:
        """Whether the layer was replaced."""
        return self.scheme != DENSE
