# A model as an image: docker build -t NAME -f e2e/model.Dockerfile FOLDER
FROM debian:bookworm-slim
COPY . /model
