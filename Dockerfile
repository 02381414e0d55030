# dinoseg in a container, for a CPU or, with a CUDA base, for NVIDIA GPUs: see docs/install.md.
ARG BASE=ubuntu:24.04
FROM ${BASE}

# g++ and the headers are for torch.compile and the Triton kernel
RUN apt-get update \
    && apt-get install -y --no-install-recommends python3 python3-venv python3-dev g++ \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /dinoseg
COPY pyproject.toml README.md LICENSE ./
COPY dinoseg ./dinoseg
COPY hydra_plugins ./hydra_plugins
RUN python3 -m venv .venv && . .venv/bin/activate && pip install --no-cache-dir .

ENV PATH=/dinoseg/.venv/bin:${PATH}
WORKDIR /runs
ENTRYPOINT ["dinoseg"]
