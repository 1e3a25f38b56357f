//! Work on many things at once, and on few without anybody's help.
//!
//! In: things, and what is to be done with each. Out: the results in the same
//! order. A thread of the pool that is woken for one file costs more than the
//! file, and then looks for more work for a while, on a processor that the peer
//! or the user may need. Nothing here knows what is done.

use rayon::iter::{FromParallelIterator, IndexedParallelIterator, IntoParallelIterator, ParallelIterator};

/// What `work` makes of each item: on this thread if there are no more than
/// `few`, else on those of the pool, in portions of at least as many.
pub(crate) fn map<T, R, C>(items: Vec<T>, few: usize, work: impl Fn(T) -> R + Sync + Send) -> C
where
    T: Send,
    R: Send,
    C: FromIterator<R> + FromParallelIterator<R>,
{
    if items.len() <= few {
        items.into_iter().map(work).collect()
    } else {
        items.into_par_iter().with_min_len(few).map(work).collect()
    }
}

/// What both make, at the same time where there is another processor.
pub(crate) fn both<A: Send, B: Send>(
    one: impl FnOnce() -> A + Send,
    other: impl FnOnce() -> B + Send,
) -> (A, B) {
    rayon::join(one, other)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn few_are_done_here_and_the_order_stays() {
        let here = std::thread::current().id();
        let threads: Vec<bool> = map(vec![1, 2, 3], 3, |_| std::thread::current().id() == here);
        assert_eq!(threads, [true; 3]);
        let many: Vec<usize> = map((0..1000).collect(), 4, |n: usize| n * 2);
        assert_eq!(many, (0..1000).map(|n| n * 2).collect::<Vec<_>>());
        let failed: Result<Vec<usize>, usize> =
            map((0..9).collect(), 4, |n| if n == 7 { Err(n) } else { Ok(n) });
        assert_eq!(failed, Err(7));
    }
}
