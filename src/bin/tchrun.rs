//! `tchrun --nproc-per-node 4 ./program …`: see [`tch_distributed::launch`].

fn main() {
    std::process::exit(tch_distributed::launch::tchrun::main());
}
