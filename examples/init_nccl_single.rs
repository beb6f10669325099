//! One rank with NCCL: works on a machine with a GPU and the `nccl` feature, and says why where it does not.

use tch_distributed as dist;

fn main() {
    let options = dist::InitOptions::new().rank(0).world_size(1);
    match dist::init_process_group("nccl", options) {
        Ok(group) => println!("rank {} of {} over {}", group.rank(), group.size(), group.backend_name()),
        Err(error) => println!("no NCCL here: {error}"),
    }
}
