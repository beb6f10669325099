//! Objects of any serde type. Each is sent in two steps: a header of fixed size (length and a check),
//! then the bytes, in the postcard format. A length that does not fit its check, or that no memory
//! can hold, is an error before anything is allocated for it.

use serde::Serialize;
use serde::de::DeserializeOwned;
use tch::{Device, Kind, Tensor};

use super::ProcessGroup;
use crate::{Error, Result};

const MAGIC: i64 = 0x7463_6864_6f62_6a31;
/// Length, and the length again, disguised.
const HEADER: usize = 2;

fn encode<T: Serialize>(object: &T) -> Result<Vec<u8>> {
    postcard::to_stdvec(object).map_err(|e| Error::Object { reason: format!("it cannot be encoded: {e}") })
}

fn decode<T: DeserializeOwned>(bytes: &[u8], rank: usize) -> Result<T> {
    let damaged = |what: String| Error::Object { reason: format!("what rank {rank} sent is {what}") };
    let (object, rest) = postcard::take_from_bytes(bytes)
        .map_err(|e| damaged(format!("no {}: {e}", std::any::type_name::<T>())))?;
    if rest.is_empty() {
        Ok(object)
    } else {
        Err(damaged(format!("no {}: {} bytes are left over", std::any::type_name::<T>(), rest.len())))
    }
}

fn header(length: usize) -> [i64; HEADER] {
    let length = length as i64;
    [length, length.rotate_left(17) ^ MAGIC]
}

fn length(header: &[i64], rank: usize) -> Result<i64> {
    match *header {
        [length, check] if length >= 0 && check == length.rotate_left(17) ^ MAGIC => Ok(length),
        _ => Err(Error::Object { reason: format!("rank {rank} sent no object, or its header is damaged") }),
    }
}

impl ProcessGroup {
    /// Where objects travel: the CPU, or the GPU where there is no backend for the CPU.
    pub(crate) fn object_device(&self) -> Device {
        if self.inner.backends.cpu.is_some() {
            Device::Cpu
        } else {
            Device::Cuda(self.inner.universe.placement().cuda())
        }
    }

    fn bytes(&self, bytes: &[u8]) -> Result<Tensor> {
        Ok(Tensor::from_slice(bytes).f_to_device(self.object_device())?)
    }

    fn room(&self, length: i64, kind: Kind) -> Result<Tensor> {
        Ok(Tensor::f_empty([length], (kind, self.object_device()))?)
    }

    /// Every rank's numbers, as many from each.
    #[track_caller]
    pub(super) fn exchange_numbers(&self, mine: &[i64]) -> Result<Vec<i64>> {
        let mut all = self.room((mine.len() * self.size()) as i64, Kind::Int64)?;
        let mine = Tensor::from_slice(mine).f_to_device(self.object_device())?;
        self.all_gather_into_tensor(&mut all, &mine)?;
        Ok(Vec::try_from(all)?)
    }

    /// Gives every rank the object of rank `src`. What other ranks pass is ignored.
    ///
    /// # Errors
    /// `RankOutOfRange`; `InvalidArgument` when `src` passes `None`; `Object` when it cannot be encoded,
    /// or is of another type; failures of the group.
    ///
    /// ```
    /// tch_distributed::testing::run_threads(2, |group| {
    ///     let mine = (group.rank() == 0).then(|| vec!["a".to_owned(), "b".to_owned()]);
    ///     assert_eq!(group.broadcast_object(mine, 0).unwrap(), ["a", "b"]);
    /// });
    /// ```
    #[doc(alias = "broadcast_object_list")]
    #[track_caller]
    pub fn broadcast_object<T: Serialize + DeserializeOwned>(
        &self,
        object: Option<T>,
        src: usize,
    ) -> Result<T> {
        self.inner.usable()?;
        self.check_rank(src)?;
        if self.rank() == src {
            let object = object
                .ok_or_else(|| Error::invalid("object", format!("rank {src} is the source and gave None")))?;
            let bytes = encode(&object)?;
            let mut head = Tensor::from_slice(&header(bytes.len())).f_to_device(self.object_device())?;
            self.broadcast(&mut head, src)?;
            self.broadcast(&mut self.bytes(&bytes)?, src)?;
            return Ok(object);
        }
        let mut head = self.room(HEADER as i64, Kind::Int64)?;
        self.broadcast(&mut head, src)?;
        let length = length(&Vec::<i64>::try_from(head)?, src)?;
        let mut bytes = self.room(length, Kind::Uint8)?;
        self.broadcast(&mut bytes, src)?;
        decode(&Vec::<u8>::try_from(bytes)?, src)
    }

    /// Gives every rank the objects of all, in rank order.
    ///
    /// # Errors
    /// `Object`; failures of the group.
    ///
    /// ```
    /// tch_distributed::testing::run_threads(3, |group| {
    ///     let names = group.all_gather_object(&format!("rank {}", group.rank())).unwrap();
    ///     assert_eq!(names, ["rank 0", "rank 1", "rank 2"]);
    /// });
    /// ```
    #[track_caller]
    pub fn all_gather_object<T: Serialize + DeserializeOwned>(&self, object: &T) -> Result<Vec<T>> {
        self.inner.usable()?;
        let bytes = encode(object)?;
        let heads = self.exchange_numbers(&header(bytes.len()))?;
        let mut all = self.rooms(&heads)?;
        self.all_gather(&mut all, &self.bytes(&bytes)?)?;
        decode_all(all)
    }

    /// Gives rank `dst` the objects of all, in rank order; `None` elsewhere.
    ///
    /// # Errors
    /// `RankOutOfRange`, `Object`; failures of the group.
    ///
    /// ```
    /// tch_distributed::testing::run_threads(2, |group| {
    ///     let all = group.gather_object(&group.rank(), 1).unwrap();
    ///     assert_eq!(all, (group.rank() == 1).then(|| vec![0, 1]));
    /// });
    /// ```
    #[track_caller]
    pub fn gather_object<T: Serialize + DeserializeOwned>(
        &self,
        object: &T,
        dst: usize,
    ) -> Result<Option<Vec<T>>> {
        self.inner.usable()?;
        self.check_rank(dst)?;
        let bytes = encode(object)?;
        let heads = self.exchange_numbers(&header(bytes.len()))?;
        if self.rank() != dst {
            self.gather(None, &self.bytes(&bytes)?, dst)?;
            return Ok(None);
        }
        let mut all = self.rooms(&heads)?;
        self.gather(Some(&mut all), &self.bytes(&bytes)?, dst)?;
        decode_all(all).map(Some)
    }

    /// Gives rank r the r-th object of rank `src`. What other ranks pass is ignored.
    ///
    /// # Errors
    /// `RankOutOfRange`; `InvalidArgument` when `src` passes `None` or not one object for each rank;
    /// `Object`; failures of the group.
    ///
    /// ```
    /// tch_distributed::testing::run_threads(2, |group| {
    ///     let list = (group.rank() == 0).then(|| vec!["left", "right"].into_iter().map(String::from).collect());
    ///     let mine: String = group.scatter_object(list, 0).unwrap();
    ///     assert_eq!(mine, if group.rank() == 0 { "left" } else { "right" });
    /// });
    /// ```
    #[doc(alias = "scatter_object_list")]
    #[track_caller]
    pub fn scatter_object<T: Serialize + DeserializeOwned>(
        &self,
        objects: Option<Vec<T>>,
        src: usize,
    ) -> Result<T> {
        self.inner.usable()?;
        self.check_rank(src)?;
        // Not every engine can scatter parts of different sizes: all are as long as the longest.
        let mut heads = self.room(2 * HEADER as i64, Kind::Int64)?;
        if self.rank() == src {
            let objects = objects.ok_or_else(|| {
                Error::invalid("objects", format!("rank {src} is the source and gave None"))
            })?;
            super::checks::one_per_rank("objects", objects.len(), self.size())?;
            let mut encoded = objects.iter().map(encode).collect::<Result<Vec<_>>>()?;
            let mine = encoded[src].clone();
            let longest = encoded.iter().map(Vec::len).max().unwrap_or(0);
            let device = self.object_device();
            let lists = encoded
                .iter()
                .map(|bytes| {
                    Tensor::from_slice(&[header(bytes.len()), header(longest)].concat()).f_to_device(device)
                })
                .collect::<Result<Vec<_>, _>>()?;
            self.scatter(&mut heads, Some(&lists), src)?;
            encoded.iter_mut().for_each(|bytes| bytes.resize(longest, 0));
            let tensors = encoded.iter().map(|bytes| self.bytes(bytes)).collect::<Result<Vec<_>>>()?;
            self.scatter(&mut self.room(longest as i64, Kind::Uint8)?, Some(&tensors), src)?;
            return decode(&mine, src);
        }
        self.scatter(&mut heads, None, src)?;
        let heads = Vec::<i64>::try_from(heads)?;
        let (own, longest) = (length(&heads[..HEADER], src)?, length(&heads[HEADER..], src)?);
        let mut bytes = self.room(longest, Kind::Uint8)?;
        self.scatter(&mut bytes, None, src)?;
        let bytes = Vec::<u8>::try_from(bytes)?;
        decode(bytes.get(..own as usize).unwrap_or(&bytes), src)
    }

    /// Sends an object to rank `dst`.
    ///
    /// # Errors
    /// As [`send`](Self::send); `Object`.
    ///
    /// ```
    /// tch_distributed::testing::run_threads(2, |group| {
    ///     if group.rank() == 0 {
    ///         group.send_object(&("learning rate", 0.1), 1, 0).unwrap();
    ///     } else {
    ///         let (from, (what, value)): (usize, (String, f64)) = group.recv_object(None, 0).unwrap();
    ///         assert_eq!((from, what.as_str(), value), (0, "learning rate", 0.1));
    ///     }
    /// });
    /// ```
    #[doc(alias = "send_object_list")]
    pub fn send_object<T: Serialize>(&self, object: &T, dst: usize, tag: u32) -> Result<()> {
        self.inner.usable()?;
        self.check_rank(dst)?;
        let bytes = encode(object)?;
        let head = Tensor::from_slice(&header(bytes.len())).f_to_device(self.object_device())?;
        self.send(&head, dst, tag)?;
        self.send(&self.bytes(&bytes)?, dst, tag)
    }

    /// Receives an object from rank `src`, or from any for `None`, and gives the sender's rank.
    ///
    /// # Errors
    /// As [`recv`](Self::recv); `Object` when what arrives is of another type.
    #[doc(alias = "recv_object_list")]
    pub fn recv_object<T: DeserializeOwned>(
        &self,
        src: impl Into<Option<usize>>,
        tag: u32,
    ) -> Result<(usize, T)> {
        self.inner.usable()?;
        let mut head = self.room(HEADER as i64, Kind::Int64)?;
        let from = self.recv(&mut head, src, tag)?;
        let length = length(&Vec::<i64>::try_from(head)?, from)?;
        let mut bytes = self.room(length, Kind::Uint8)?;
        self.recv(&mut bytes, from, tag)?;
        Ok((from, decode(&Vec::<u8>::try_from(bytes)?, from)?))
    }

    /// Room for what the headers announce. All are looked at first: every rank sees the same headers,
    /// so a damaged one is the same error everywhere.
    fn rooms(&self, heads: &[i64]) -> Result<Vec<Tensor>> {
        let lengths = heads
            .chunks(HEADER)
            .enumerate()
            .map(|(rank, head)| length(head, rank))
            .collect::<Result<Vec<_>>>()?;
        lengths.into_iter().map(|length| self.room(length, Kind::Uint8)).collect()
    }
}

fn decode_all<T: DeserializeOwned>(all: Vec<Tensor>) -> Result<Vec<T>> {
    all.into_iter().enumerate().map(|(rank, bytes)| decode(&Vec::<u8>::try_from(bytes)?, rank)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_damaged_length_is_an_error_before_anything_is_allocated() {
        let good = header(1000);
        assert_eq!(length(&good, 0).unwrap(), 1000);
        for damaged in [[good[0] | 1 << 60, good[1]], [-1, good[1]], [good[0], good[1] ^ 1]] {
            assert!(matches!(length(&damaged, 0), Err(Error::Object { .. })));
        }
    }

    #[test]
    fn an_object_of_another_type_is_an_error() {
        let bytes = encode(&(1u8, "text")).unwrap();
        assert_eq!(decode::<(u8, String)>(&bytes, 0).unwrap(), (1, "text".to_owned()));
        assert!(
            matches!(decode::<u8>(&bytes, 3), Err(Error::Object { reason }) if reason.contains("rank 3"))
        );
        assert!(matches!(decode::<Vec<String>>(&[255; 9], 0), Err(Error::Object { .. })));
    }
}
