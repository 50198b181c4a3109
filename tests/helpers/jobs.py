"""Jobs of the engine, and running them to their end."""

from dlm_ray.generation.sampling import resolve_sampling
from dlm_ray.serving.jobs import Job


def job(
    model,
    prompt="the model",
    length=12,
    *,
    suffix=None,
    stream_canvas=False,
    stops=(),
    deadline=None,
    number=0,
    request="r",
    **options,
):
    """Return a job of one text; `options` are sampling parameters."""
    ids = [model.tokenizer_identity.start_id, *model.encode(prompt)]
    resolved = resolve_sampling(options, model.sampling_target(), length)
    after = None if suffix is None else model.encode(suffix)
    return Job(request, ids, length, resolved, after, options.get("seed", 0), number, stops, stream_canvas, deadline)


def finish(engine, now=0.0, texts=None):
    """Tick until nothing is left; return the texts by job and all updates."""
    texts, updates = {} if texts is None else texts, []
    while engine.num_active or engine.waiting:
        for update in engine.tick(now):
            updates.append(update)
            texts[update.job] = texts.get(update.job, "") + update.text
    return texts, updates
