"""How fast a step is and how much it keeps, beside torch's own optimizers: what `hf-tam bench` runs.

| module | what it does |
|---|---|
| `workloads` | the parameter shapes of real models |
| `contenders` | the optimizers that can be compared, and what each must move |
| `measuring` | interleaved rounds, state bytes, temporaries |
| `processes` | the same under FSDP2, in processes of its own |
| `statistics` | ratios pair by pair, and their interval |
| `machine`, `printing` | what the numbers were measured on; the table |
"""
