//! The collectives as functions on the default group.

use std::time::Duration;

use serde::Serialize;
use serde::de::DeserializeOwned;
use tch::Tensor;

use super::{GroupOptions, P2pOp, ProcessGroup, ReduceOp, Work, world};
use crate::Result;

/// Functions that find the default group and call its method of the same name.
macro_rules! on_the_default_group {
    ($($name:ident $([$($generic:ident: $bound:path $(, $more:path)?);+])? ($($argument:ident: $type:ty),*) -> $result:ty;)*) => {$(
        #[doc = concat!("[`ProcessGroup::", stringify!($name), "`] on the default group.")]
        ///
        /// # Errors
        /// `NotInitialized` where there is no default group; those of the method.
        #[track_caller]
        pub fn $name$(<$($generic: $bound $(+ $more)?),+>)?($($argument: $type),*) -> Result<$result> {
            world()?.$name($($argument),*)
        }
    )*};
}

on_the_default_group! {
    all_reduce(tensor: &mut Tensor, op: ReduceOp) -> ();
    all_reduce_async(tensor: &Tensor, op: ReduceOp) -> Work;
    reduce(tensor: &mut Tensor, dst: usize, op: ReduceOp) -> ();
    reduce_async(tensor: &Tensor, dst: usize, op: ReduceOp) -> Work;
    broadcast(tensor: &mut Tensor, src: usize) -> ();
    broadcast_async(tensor: &Tensor, src: usize) -> Work;
    all_gather(outputs: &mut [Tensor], input: &Tensor) -> ();
    all_gather_async(outputs: &[Tensor], input: &Tensor) -> Work;
    all_gather_uneven(input: &Tensor) -> Vec<Tensor>;
    all_gather_into_tensor(output: &mut Tensor, input: &Tensor) -> ();
    all_gather_into_tensor_async(output: &Tensor, input: &Tensor) -> Work;
    gather(outputs: Option<&mut [Tensor]>, input: &Tensor, dst: usize) -> ();
    gather_async(outputs: Option<&[Tensor]>, input: &Tensor, dst: usize) -> Work;
    scatter(output: &mut Tensor, inputs: Option<&[Tensor]>, src: usize) -> ();
    scatter_async(output: &Tensor, inputs: Option<&[Tensor]>, src: usize) -> Work;
    reduce_scatter(output: &mut Tensor, inputs: &[Tensor], op: ReduceOp) -> ();
    reduce_scatter_async(output: &Tensor, inputs: &[Tensor], op: ReduceOp) -> Work;
    reduce_scatter_tensor(output: &mut Tensor, input: &Tensor, op: ReduceOp) -> ();
    reduce_scatter_tensor_async(output: &Tensor, input: &Tensor, op: ReduceOp) -> Work;
    all_to_all(outputs: &mut [Tensor], inputs: &[Tensor]) -> ();
    all_to_all_async(outputs: &[Tensor], inputs: &[Tensor]) -> Work;
    all_to_all_single(output: &mut Tensor, input: &Tensor, output_splits: Option<&[i64]>, input_splits: Option<&[i64]>) -> ();
    all_to_all_single_async(output: &Tensor, input: &Tensor, output_splits: Option<&[i64]>, input_splits: Option<&[i64]>) -> Work;
    barrier() -> ();
    barrier_async() -> Work;
    monitored_barrier(timeout: Duration, wait_all_ranks: bool) -> ();
    send(tensor: &Tensor, dst: usize, tag: u32) -> ();
    recv(tensor: &mut Tensor, src: impl Into<Option<usize>>, tag: u32) -> usize;
    isend(tensor: &Tensor, dst: usize, tag: u32) -> Work;
    irecv(tensor: &Tensor, src: impl Into<Option<usize>>, tag: u32) -> Work;
    batch_isend_irecv(ops: Vec<P2pOp>) -> Vec<Work>;
    all_reduce_coalesced(tensors: &mut [Tensor], op: ReduceOp) -> ();
    all_reduce_coalesced_async(tensors: &[Tensor], op: ReduceOp) -> Work;
    all_gather_into_tensor_coalesced(outputs: &mut [Tensor], inputs: &[Tensor]) -> ();
    all_gather_into_tensor_coalesced_async(outputs: &[Tensor], inputs: &[Tensor]) -> Work;
    reduce_scatter_tensor_coalesced(outputs: &mut [Tensor], inputs: &[Tensor], op: ReduceOp) -> ();
    reduce_scatter_tensor_coalesced_async(outputs: &[Tensor], inputs: &[Tensor], op: ReduceOp) -> Work;
    broadcast_object [T: Serialize, DeserializeOwned](object: Option<T>, src: usize) -> T;
    all_gather_object [T: Serialize, DeserializeOwned](object: &T) -> Vec<T>;
    gather_object [T: Serialize, DeserializeOwned](object: &T, dst: usize) -> Option<Vec<T>>;
    scatter_object [T: Serialize, DeserializeOwned](objects: Option<Vec<T>>, src: usize) -> T;
    send_object [T: Serialize](object: &T, dst: usize, tag: u32) -> ();
    recv_object [T: DeserializeOwned](src: impl Into<Option<usize>>, tag: u32) -> (usize, T);
    new_group(ranks: &[usize]) -> Option<ProcessGroup>;
    new_group_with(ranks: &[usize], options: GroupOptions) -> Option<ProcessGroup>;
    new_subgroups(group_size: usize) -> (ProcessGroup, Vec<Vec<usize>>);
    new_subgroups_by_enumeration(ranks_per_group: &[Vec<usize>]) -> Option<ProcessGroup>;
    split(color: Option<i64>, key: i64) -> Option<ProcessGroup>;
    abort() -> ();
}
