//! The tables of the documentation say what is true.

use std::path::Path;

/// Everything that is written in Rust below a folder.
fn sources(folder: &Path) -> String {
    let mut text = String::new();
    for entry in std::fs::read_dir(folder).unwrap().map(Result::unwrap) {
        let path = entry.path();
        if path.is_dir() {
            text += &sources(&path);
        } else if path.extension().is_some_and(|e| e == "rs") {
            text += &std::fs::read_to_string(path).unwrap();
        }
    }
    text
}

#[test]
fn every_test_that_stands_for_one_of_pytorchs_exists() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let code = sources(&root.join("tests")) + &sources(&root.join("src"));
    let rows = include_str!("PYTORCH.md").lines().filter(|line| line.starts_with('|')).skip(2);
    let mut named = 0;
    for row in rows {
        let ours = row.split('|').nth(3).unwrap_or_default();
        let names: Vec<&str> = ours.split('`').filter(|name| !name.trim().is_empty()).collect();
        assert!(!names.is_empty(), "nothing stands for {row}");
        for name in names {
            assert!(code.contains(&format!("fn {name}(")), "there is no test {name}");
            named += 1;
        }
    }
    assert!(named >= 60, "{named}");
}

#[test]
fn the_migration_table_tells_of_every_function_of_torch_distributed() {
    let text = include_str!("../../src/migration.md");
    // `torch.distributed.__all__` of PyTorch 2.13, without the classes of options and of backends.
    let torch = [
        "is_available",
        "is_initialized",
        "is_gloo_available",
        "is_nccl_available",
        "is_mpi_available",
        "is_ucc_available",
        "is_xccl_available",
        "is_backend_available",
        "is_torchelastic_launched",
        "init_process_group",
        "destroy_process_group",
        "get_rank",
        "get_world_size",
        "get_backend",
        "get_backend_config",
        "get_default_backend_for_device",
        "get_group_rank",
        "get_global_rank",
        "get_process_group_ranks",
        "get_node_local_rank",
        "get_pg_count",
        "new_group",
        "new_subgroups",
        "new_subgroups_by_enumeration",
        "split_group",
        "shrink_group",
        "broadcast",
        "all_reduce",
        "all_reduce_coalesced",
        "reduce",
        "all_gather",
        "all_gather_into_tensor",
        "all_gather_single",
        "all_gather_coalesced",
        "gather",
        "scatter",
        "reduce_scatter",
        "reduce_scatter_tensor",
        "reduce_scatter_single",
        "all_to_all",
        "all_to_all_single",
        "barrier",
        "monitored_barrier",
        "send",
        "recv",
        "isend",
        "irecv",
        "batch_isend_irecv",
        "P2POp",
        "all_gather_object",
        "gather_object",
        "broadcast_object_list",
        "scatter_object_list",
        "send_object_list",
        "recv_object_list",
        "ReduceOp",
        "Backend",
        "BackendConfig",
        "GroupMember",
        "group.WORLD",
        "ProcessGroup",
        "Work",
        "Store",
        "TCPStore",
        "FileStore",
        "HashStore",
        "PrefixStore",
        "supports_complex",
        "record_comm",
        "breakpoint",
        "_coalescing_manager",
        "Backend.register_backend",
        "_set_pg_timeout",
        "_abort_process_group",
        "_time_estimator",
        "DistError",
        "get_debug_level",
    ];
    for name in torch {
        assert!(text.contains(&format!("`{name}`")), "the table does not tell of {name}");
    }
}
