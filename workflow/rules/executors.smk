# Executors that read a resource under a name of their own. Rules state threads, mem_mb, runtime and gpu; the profile of
# such an executor names its words under `set-resource-scopes`, and every rule then states them too, with the number that
# holds in the end. (In `set-resources` of a profile they would be lost with the first `--set-resources` on the command
# line, and would themselves hide those of a site's profile.)
SPELLINGS = {
    "nvidia_gpu": ("gpu", int),
    "googlebatch_cpu_milli": ("threads", lambda threads: 1000 * threads),
    "googlebatch_memory": ("mem_mb", int),
    "googlebatch_max_run_duration": ("runtime", lambda minutes: f"{60 * minutes}s"),
    "_gpus": ("gpu", int),
    "request_gpus": ("gpu", int),
    "htcondor_request_mem_mb": ("mem_mb", int),
    "allowed_execute_duration": ("runtime", lambda minutes: 60 * minutes),
    "lsf_extra": ("gpu", lambda gpus: f"-gpu num={gpus}"),
}


def spelled(plain, form):
    """A resource function: the value of a plain resource in an executor's words."""

    def value(wildcards, input, attempt, threads, rulename, async_run):
        about = dict(input=input, attempt=attempt, threads=threads, rulename=rulename, async_run=async_run)
        number = plain.evaluate(wildcards, **about).value if plain else threads
        if isinstance(number, str):
            return number  # to be determined, when the inputs are there
        return form(number) if number else None

    return value


def joined(given, own):
    """A resource function: the words that a site gives for every job, and those of the rule."""

    def value(wildcards, input, attempt, threads, rulename, async_run):
        about = dict(input=input, attempt=attempt, threads=threads, rulename=rulename, async_run=async_run)
        words = [given.evaluate(wildcards, **about).value, own(wildcards, **about)]
        return " ".join(word for word in words if word) or None

    return value


def respell(resources):
    """Add to the resources of a rule those that the profile has another word for; a site's own word stays."""
    for word in set(SPELLINGS) & set(workflow.resource_scopes):
        stated, form = SPELLINGS[word]
        if "mem_mb" in resources and (stated in resources or stated == "threads"):
            own = spelled(resources[stated] if stated != "threads" else None, form)
            if word == "lsf_extra" and word in resources:
                own = joined(resources[word], own)
            if word == "lsf_extra" or word not in resources:
                resources[word] = own


for defined in workflow.rules:
    respell(defined.resources)
