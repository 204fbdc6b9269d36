"""Changes to DeepSpeed's own behaviour, each with its reason; idempotent, made when called, which imports it."""

_SHM_OP = "deepspeed_shm_comm"


def skip_shm_op() -> None:
    """Keep DeepSpeed from compiling its shared-memory all-reduce; call it before deepspeed.initialize.

    On CPU every start builds or loads that extension: about 60 CPU seconds the first time, and a process
    killed meanwhile leaves a lock on which all later runs wait for ever. It serves only
    `inference_all_reduce`, which training never calls. DeepSpeed has no setting for it; it builds what the
    private table of compatible operations allows, so the entry is turned off there. On GPU it changes
    nothing: the builder exists on CPU only.
    """
    import deepspeed

    table = getattr(deepspeed.ops, "__compatible_ops__", None)
    if isinstance(table, dict):
        table[_SHM_OP] = False


def skip_lone_reduction(engine: object) -> None:
    """On one rank, keep a DeepSpeed engine from copying all gradients into a buffer, averaging and copying back.

    The average over one rank is the gradient itself. On CPU those copies are a tenth of the quick start's step. At
    stages 1 and 2 it helps without contiguous_gradients only, whose buffer is filled before; stage 3 stays as it is.
    """
    if engine.zero_optimization_stage() == 0:
        engine.enable_backward_allreduce = False
    elif hasattr(engine.optimizer, "buffered_reduce_fallback"):
        engine.optimizer.buffered_reduce_fallback = _nothing


def _nothing(*arguments: object, **options: object) -> None:
    return None
