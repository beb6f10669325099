//! Mistakes are errors that say what to do.

use tch_distributed as dist;

fn main() {
    // No group yet: the error says to call init_process_group.
    println!("{}", dist::rank().unwrap_err());

    // Half of the numbers: the error names world_size, and where it could come from.
    let only_a_rank = dist::InitOptions::new().rank(0);
    println!("{}", dist::init_process_group("native", only_a_rank).unwrap_err());
}
