# movae-fast on a CPU or, with `docker run --gpus all`, on a GPU: torch brings its CUDA, the kernels are Triton's.
#   docker build -t movae-fast .
#   docker run --rm -it -v "$PWD/runs:/work/runs" movae-fast train --config demo
FROM python:3.11-slim AS build
RUN apt-get update && apt-get install -y --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*
COPY . /src
WORKDIR /src
RUN pip install --no-cache-dir build && MOVAE_NO_CUDA=1 python -m build --wheel --outdir /dist

FROM python:3.11-slim
# A C compiler for Triton's launchers and torch.compile; libgomp1 for the CPU's ops.
RUN apt-get update && apt-get install -y --no-install-recommends gcc g++ libgomp1 && rm -rf /var/lib/apt/lists/*
COPY --from=build /dist/*.whl /tmp/
RUN pip install --no-cache-dir torch==2.11.0 torchvision==0.26.0 triton==3.6.0 /tmp/*.whl && rm /tmp/*.whl
WORKDIR /work
ENTRYPOINT ["movae"]
CMD ["--help"]
