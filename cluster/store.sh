# How the machines of a cluster reach an object store that asks for keys (docs/object_stores.md).
# Keys do not belong into a repository: fill in a copy elsewhere that only you may read, and name it
#
#   install -m 600 cluster/store.sh ~/.tmu-dist-store.sh
#   python cluster/render.py cluster/on_prem.yaml --store ~/.tmu-dist-store.sh ...
#
# Machines with rights of their own, as in a cloud, need none of this.

# export AWS_ENDPOINT_URL=http://minio.example:9000
# export AWS_REGION=us-east-1
# export AWS_ACCESS_KEY_ID=
# export AWS_SECRET_ACCESS_KEY=
