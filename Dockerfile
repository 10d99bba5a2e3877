# One image for every role: kvasir worker, kvnode, router and operator; redis-server for the index.
# Dependencies are layers of their own: a change of code alone installs nothing again.
FROM debian:bookworm-slim AS runtime
RUN apt-get update -qq \
 && apt-get install -y -qq --no-install-recommends python3 libstdc++6 redis-server >/dev/null \
 && rm -rf /var/lib/apt/lists/* \
 && useradd --uid 10001 --user-group --no-create-home --home-dir /tmp kvasir

FROM runtime AS builder
RUN apt-get update -qq \
 && apt-get install -y -qq --no-install-recommends g++ python3-dev python3-venv >/dev/null \
 && rm -rf /var/lib/apt/lists/*
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_PROGRESS_BAR=off
RUN python3 -m venv /opt/build \
 && /opt/build/bin/pip install -q 'scikit-build-core>=0.10' 'nanobind>=2.4' 'cmake>=3.18' ninja
RUN python3 -m venv --without-pip /opt/kvasir

# 1. What Kvasir depends on, read from pyproject.toml; of the extras, what workers
# beside vLLM and KV nodes with an object store need.
COPY pyproject.toml /src/
RUN /opt/build/bin/python -c "import tomllib; p = tomllib.load(open('/src/pyproject.toml', 'rb'))['project']; print(*p['dependencies'], *p['optional-dependencies']['vllm'], *p['optional-dependencies']['s3'], sep='\n')" > /src/requirements.txt \
 && /opt/build/bin/pip --python /opt/kvasir/bin/python install -q -r /src/requirements.txt

# 2. The native parts: compiled once into a build folder that step 3 finds up to date.
WORKDIR /src
ENV CMAKE_BUILD_PARALLEL_LEVEL=2
COPY CMakeLists.txt LICENSE ./
COPY engine/native engine/native
COPY kvstore/native kvstore/native
COPY router/native router/native
RUN /opt/build/bin/python -c "import tomllib; print(*tomllib.load(open('pyproject.toml', 'rb'))['tool']['scikit-build']['wheel']['packages'], sep='\n')" | xargs mkdir -p && touch README.md \
 && /opt/build/bin/pip wheel -q --no-build-isolation --no-deps -w /discarded .

# 3. Kvasir's wheel.
COPY README.md ./
COPY proto proto
COPY kvstore kvstore
COPY engine engine
COPY router router
COPY operator operator
COPY sim sim
COPY cli cli
RUN /opt/build/bin/pip wheel -q --no-build-isolation --no-deps -w /wheels . \
 && /opt/build/bin/pip --python /opt/kvasir/bin/python install -q --no-deps /wheels/*.whl

FROM runtime
COPY --from=builder /opt/kvasir /opt/kvasir
ENV PATH=/opt/kvasir/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
USER 10001:10001
ENTRYPOINT ["kvasir"]
