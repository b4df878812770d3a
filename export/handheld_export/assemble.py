"""Writing the program that generates one picture.

Steps are unrolled, guidance is two calls and one affine combination, and what depends on
the step is a constant, so every step calls the same artifacts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray

from handheld.program import Affine, Call, Input, Op, Program, TensorSpec, Term
from handheld_export.checkpoint import Component
from handheld_export.sampling import Step
from handheld_export.segments import Graph, Segment

Array = NDArray[np.float32]
LATENT: Final = "latent"
"""The tensor that the decoder is given."""


@dataclass
class Draft:
    """A program in the making, with the constants it reads."""

    inputs: list[Input] = field(default_factory=list)
    tensors: dict[str, TensorSpec] = field(default_factory=dict)
    ops: list[Op] = field(default_factory=list)
    constants: dict[str, Array] = field(default_factory=dict)

    def input(self, name: str, shape: tuple[int, ...], **what: object) -> str:
        """Declare an input."""
        self.inputs.append(Input.model_validate({"name": name, **what}))
        self.tensors[name] = TensorSpec(shape=shape)
        return name

    def affine(
        self, out: str, *terms: tuple[str, float], bias: float = 0.0, dtype: str = "float32"
    ) -> str:
        """Append an affine combination."""
        shape = self.spec(terms[0][0]).shape
        self.tensors[out] = TensorSpec.model_validate({"shape": shape, "dtype": dtype})
        self.ops.append(
            Affine(terms=tuple(Term(x=x, scale=s) for x, s in terms), bias=bias, out=out)
        )
        return out

    def spec(self, name: str) -> TensorSpec:
        """Spec of a tensor or constant."""
        if name in self.constants:
            return TensorSpec(shape=self.constants[name].shape)
        return self.tensors[name]

    def picture(self, decoded: str) -> str:
        """Append the rounding of what a decoder gives to a picture."""
        return self.affine("picture", (decoded, 127.5), bias=127.5, dtype="uint8")

    def calls(self, segments: Sequence[Segment], prefix: str, names: dict[str, str]) -> str:
        """Append calls of a component's segments; return the name of the result.

        Parameters
        ----------
        segments : sequence of Segment
        prefix : str
            Before the names of the tensors that the calls write.
        names : dict
            Graph input to tensor name.
        """
        known = dict(names)
        for segment in segments:
            ports = segment.ports
            results = {n: f"{prefix}{n}" for n in segment.outputs}
            self.ops.append(
                Call(
                    artifact=segment.id,
                    args={n: known[n] for n in segment.inputs},
                    results=results,
                )
            )
            for port, name in results.items():
                self.tensors[name] = ports.outputs[port]
            known.update(results)
        return known[segments[-1].graph.output]


def time_embeddings(component: Component, graph: Graph, steps: Sequence[int]) -> dict[int, Array]:
    """Embed timesteps with the U-Net's own time embedding.

    Returns
    -------
    dict of timestep to float32 ndarray [1, E]
    """
    model = graph.model
    names = [n for n in model.state_dict() if n.startswith("time_embedding.")]
    values = component.tensors(names)
    embedding = model.get_submodule("time_embedding")
    embedding.load_state_dict(
        {n.removeprefix("time_embedding."): v for n, v in values.items()}, assign=True
    )
    with torch.no_grad():
        result = {
            t: embedding(model.time_proj(torch.tensor([t]))).numpy().copy()  # type: ignore[operator]
            for t in steps
        }
    embedding.to(device="meta")
    return result


def time_ids(graph: Graph, size: tuple[int, int]) -> Array:
    """Embed SDXL's size conditioning: original size, crop corner, target size.

    Parameters
    ----------
    graph : Graph
        The U-Net's.
    size : (int, int)
        Height and width of the picture, which stands for original and target size.
    """
    ids = torch.tensor([*size, 0, 0, *size])
    with torch.no_grad():
        return graph.model.add_time_proj(ids).reshape(1, -1).numpy()  # type: ignore[operator,no-any-return]


def assemble(
    *,
    unet: Sequence[Segment],
    embedding: Sequence[Segment],
    decode: Callable[[Draft, str], str],
    steps: Sequence[Step],
    embedded: dict[int, Array],
    size_ids: Array | None,
    guidance: float,
    latent_scale: tuple[float, float],
) -> tuple[Program, dict[str, Array]]:
    """Write the program from noise to picture.

    Parameters
    ----------
    unet, embedding : sequences of Segment
        ``embedding`` is empty for models without added embeddings.
    decode : callable
        Appends the decoder to the draft, given the latent's name; returns the result's.
    steps : sequence of Step
    embedded : dict
        From :func:`time_embeddings`.
    size_ids : ndarray or None
        From :func:`time_ids`.
    guidance : float
        1 is none; otherwise ``eps = neg + guidance * (pos - neg)``.
    latent_scale : (float, float)
        ``decoder input = scale * latent + shift``.

    Returns
    -------
    program : Program
    constants : dict of name to ndarray
    """
    draft = Draft()
    graph = unet[0].graph
    n, c, h, w = graph.shapes["sample"]
    shape = (n, h, w, c)
    x = draft.input("noise", shape, role="noise", stream=0)
    branches = [""] if guidance == 1.0 else ["", "negative_"]
    for branch in branches:
        negative = bool(branch)
        draft.input(
            f"{branch}prompt_embeds",
            graph.shapes["context"],
            role="prompt_embeds",
            negative=negative,
        )
        if embedding:
            draft.input(
                f"{branch}pooled",
                embedding[0].graph.shapes["pooled"],
                role="pooled",
                negative=negative,
            )
    added = {}
    if embedding and size_ids is not None:
        draft.constants["time_ids"] = size_ids
        for branch in branches:
            added[branch] = draft.calls(
                embedding, branch, {"pooled": f"{branch}pooled", "time_ids": "time_ids"}
            )
    before = ""
    for i, step in enumerate(steps):
        at = f"s{i}."
        time = f"time.{step.timestep}"
        draft.constants[time] = embedded[step.timestep]
        predictions = []
        for branch in branches:
            emb = time
            if branch in added:
                emb = draft.affine(f"{at}{branch}emb", (time, 1.0), (added[branch], 1.0))
            predictions.append(
                draft.calls(
                    unet,
                    f"{at}{branch}",
                    {"sample": x, "emb": emb, "context": f"{branch}prompt_embeds"},
                )
            )
        eps = predictions[0]
        if len(predictions) == 2:
            eps = draft.affine(
                f"{at}eps", (predictions[0], guidance), (predictions[1], 1.0 - guidance)
            )
        values = {"x": x, "eps": eps, "x0": before}
        if "noise" in step.terms:
            values["noise"] = draft.input(f"noise.{i + 1}", shape, role="noise", stream=i + 1)
        if step.x0 is not None:
            before = draft.affine(f"{at}x0", (x, step.x0[0]), (eps, step.x0[1]))
        x = draft.affine(f"{at}latent", *((values[k], s) for k, s in step.terms.items()))
    z = draft.affine(LATENT, (x, latent_scale[0]), bias=latent_scale[1])
    decoded = decode(draft, z)
    picture = draft.picture(decoded)
    program = Program(
        inputs=tuple(draft.inputs),
        tensors=draft.tensors,
        ops=tuple(draft.ops),
        outputs={"picture": picture},
    )
    return program, draft.constants
