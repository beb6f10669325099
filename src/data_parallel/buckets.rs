//! Which gradients travel together, and in which order: a pure plan, the same on every rank.

/// What the plan needs to know of a parameter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Item {
    /// The size of its gradient.
    pub(super) bytes: usize,
    /// Its kind and device as a number: one bucket holds one class.
    pub(super) class: usize,
}

/// Buckets in the order in which they are sent.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Plan {
    /// The parameters of each bucket, in the order in which their gradients are expected.
    pub(super) buckets: Vec<Vec<usize>>,
    /// The bucket of each parameter; none for one that is not reduced.
    pub(super) bucket_of: Vec<Option<usize>>,
}

/// Fills buckets in the order given. A bucket is full when it holds at least `first` bytes (the first of
/// its class) or `cap` bytes. Buckets come in the order in which their last gradient is expected, since
/// that is when they can go.
pub(super) fn plan(order: &[usize], items: &[Item], first: usize, cap: usize) -> Plan {
    struct Open {
        class: usize,
        bytes: usize,
        limit: usize,
        members: Vec<usize>,
    }
    let first = first.min(cap);
    let mut open: Vec<Open> = Vec::new();
    let mut closed: Vec<(usize, Vec<usize>)> = Vec::new();
    let mut last_seen = vec![0; items.len()];
    for (position, &index) in order.iter().enumerate() {
        let item = items[index];
        last_seen[index] = position;
        let slot = match open.iter().position(|o| o.class == item.class) {
            Some(slot) => slot,
            None => {
                open.push(Open { class: item.class, bytes: 0, limit: first, members: Vec::new() });
                open.len() - 1
            }
        };
        let bucket = &mut open[slot];
        bucket.members.push(index);
        bucket.bytes += item.bytes;
        if bucket.bytes >= bucket.limit {
            closed.push((position, std::mem::take(&mut bucket.members)));
            (bucket.bytes, bucket.limit) = (0, cap);
        }
    }
    for bucket in open {
        if let Some(&last) = bucket.members.last() {
            closed.push((last_seen[last], bucket.members));
        }
    }
    closed.sort_by_key(|&(position, _)| position);
    let buckets: Vec<_> = closed.into_iter().map(|(_, members)| members).collect();
    let mut bucket_of = vec![None; items.len()];
    for (bucket, members) in buckets.iter().enumerate() {
        members.iter().for_each(|&index| bucket_of[index] = Some(bucket));
    }
    Plan { buckets, bucket_of }
}

/// The order in which gradients are expected before any has been seen: the reverse of the order in
/// which the model was made.
pub(super) fn reverse_order(count: usize) -> Vec<usize> {
    (0..count).rev().collect()
}

/// The order in which gradients arrived, and behind them those that did not arrive, last made first.
pub(super) fn arrival_order(arrived: &[usize], count: usize) -> Vec<usize> {
    let mut seen = vec![false; count];
    let mut order = Vec::with_capacity(count);
    for &index in arrived {
        if index < count && !std::mem::replace(&mut seen[index], true) {
            order.push(index);
        }
    }
    order.extend((0..count).rev().filter(|&index| !seen[index]));
    order
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn of_one_class(sizes: &[usize]) -> Vec<Item> {
        sizes.iter().map(|&bytes| Item { bytes, class: 0 }).collect()
    }

    #[test]
    fn eight_equal_layers_make_a_small_first_bucket_and_then_large_ones() {
        let items = of_one_class(&[4; 8]);
        let plan = plan(&reverse_order(8), &items, 1, 25);
        assert_eq!(plan.buckets, [vec![7], vec![6, 5, 4, 3, 2, 1, 0]]);
        assert_eq!(plan.bucket_of[7], Some(0));
        assert_eq!(plan.bucket_of[0], Some(1));
    }

    #[test]
    fn kinds_do_not_share_a_bucket_and_buckets_come_in_the_order_they_can_go() {
        let items = [(8, 0), (8, 1), (8, 0), (8, 1), (8, 0)].map(|(bytes, class)| Item { bytes, class });
        let plan = plan(&reverse_order(5), &items, 16, 16);
        assert_eq!(plan.buckets, [vec![4, 2], vec![3, 1], vec![0]]);
    }

    #[test]
    fn a_first_bucket_is_never_larger_than_the_cap() {
        assert_eq!(plan(&[0, 1, 2], &of_one_class(&[4; 3]), 100, 8).buckets, [vec![0, 1], vec![2]]);
    }

    #[test]
    fn parameters_that_did_not_arrive_come_last() {
        assert_eq!(arrival_order(&[2, 0], 5), [2, 0, 4, 3, 1]);
    }

    proptest! {
        #[test]
        fn every_parameter_is_in_exactly_one_bucket_of_its_class(
            items in prop::collection::vec((0usize..40, 0usize..3), 0..40),
            first in 0usize..50, cap in 0usize..50,
        ) {
            let items: Vec<Item> = items.into_iter().map(|(bytes, class)| Item { bytes, class }).collect();
            let plan = plan(&reverse_order(items.len()), &items, first, cap);
            let mut seen: Vec<usize> = plan.buckets.iter().flatten().copied().collect();
            seen.sort_unstable();
            prop_assert_eq!(seen, (0..items.len()).collect::<Vec<_>>());
            for (b, bucket) in plan.buckets.iter().enumerate() {
                prop_assert!(!bucket.is_empty());
                for &index in bucket {
                    prop_assert_eq!(plan.bucket_of[index], Some(b));
                    prop_assert_eq!(items[index].class, items[bucket[0]].class);
                }
                // All but its last member fit below the cap.
                let before: usize = bucket[..bucket.len() - 1].iter().map(|&i| items[i].bytes).sum();
                prop_assert!(bucket.len() == 1 || before < cap);
            }
        }
    }
}
