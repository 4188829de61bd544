//! Owns: an unfinished segment put together from the tails of every repository.
//! Does not own: which tails count (`catalog/tails.rs`), whether they are the end of the path's WAL (`wal_get.rs`).

use std::path::Path;

use super::asked::Holder;
use super::error::WalGetError;
use super::object::{self, Object, Use};
use super::request::Wanted;
use super::target::Target;
use crate::catalog::tails::{self, JoinedTails, TailChain};
use crate::catalog::{DirectoryContents, TailObject};
use crate::repository::layout::TailName;
use crate::wal::{Lsn, SegmentName};

/// The tails of one segment in one repository.
#[derive(Debug)]
pub struct Tails<'a> {
    holder: &'a Holder,
    source: SegmentName,
    objects: Vec<TailObject>,
    chain: TailChain,
}

impl<'a> Tails<'a> {
    /// `None` when there are none. An empty object counts by its name: what it should hold is missed.
    pub fn of(holder: &'a Holder, source: SegmentName, contents: &DirectoryContents) -> Option<Tails<'a>> {
        let objects = contents.tails.get(&source).filter(|tails| !tails.is_empty())?.clone();
        let chain = tails::resolve(&objects.iter().map(|object| object.name).collect::<Vec<_>>());
        Some(Tails { holder, source, objects, chain })
    }

    fn holds(&self, tail: &TailName) -> impl Iterator<Item = TailObject> {
        let same = content_of(tail);
        self.objects.iter().filter(move |object| content_of(&object.name) == same).copied()
    }

    fn object(&self, tail: TailObject) -> Object {
        Object {
            key: self.holder.archive.lineage.tail(self.source, &tail.name),
            form: tail.name.form,
            stored_bytes: tail.stored_bytes,
            raw_bytes: tail.name.to - tail.name.from,
        }
    }
}

/// Two tails with these the same are the same bytes, whoever wrote them in whatever form.
fn content_of(tail: &TailName) -> (Lsn, Lsn, u32) {
    (tail.from, tail.to, tail.raw_crc32)
}

/// The tails of all repositories together.
#[derive(Debug)]
pub struct Unfinished<'a> {
    tails: Vec<Tails<'a>>,
    /// The ways to put them together that reach furthest; never empty.
    ways: Vec<JoinedTails>,
}

impl<'a> Unfinished<'a> {
    /// Which of the tails count, as far as their names tell.
    pub fn resolve(wanted: &Wanted, source: SegmentName, tails: Vec<Tails<'a>>) -> Result<Unfinished<'a>, WalGetError> {
        let chains: Vec<TailChain> = tails.iter().map(|tails| tails.chain.clone()).collect();
        let ways: Vec<JoinedTails> = tails::furthest(&chains, wanted.start).into_iter().map(|(_, way)| way).collect();
        if let Some((one, other)) = ways.iter().find_map(|way| way.contradiction) {
            let name = |index: usize| tails[index].holder.repository.clone();
            return Err(WalGetError::Contradicted { name: source, one: name(one), other: name(other) });
        }
        if ways.is_empty() {
            let fault = "its tails do not hold its beginning".to_string();
            return Err(WalGetError::Hole { name: source, fault });
        }
        Ok(Unfinished { tails, ways })
    }

    pub fn end(&self) -> Lsn {
        self.ways[0].end
    }

    /// Where tails go on beyond the end, after a hole or without anything that joins them.
    pub fn beyond(&self) -> Option<Lsn> {
        self.ways[0].beyond.map(|(_, link)| link.from.max(self.end()))
    }

    /// Writes the tails one after the other, in the first way whose objects are intact. Bytes that two hold are
    /// compared, also those of repositories that are not needed.
    pub async fn deliver(&self, wanted: &Wanted, dest: &Path) -> Result<(), WalGetError> {
        let mut fault = None;
        for way in &self.ways {
            match self.assemble(way, wanted, dest).await {
                Err(error) if error.is_of_one_copy() => fault = WalGetError::or_graver(fault, error),
                ended => return ended,
            }
        }
        Err(fault.expect("there is a way, and it failed"))
    }

    async fn assemble(&self, way: &JoinedTails, wanted: &Wanted, dest: &Path) -> Result<(), WalGetError> {
        let mut target = Target::new(dest, way.end.min(wanted.limit) - wanted.start)?;
        for (_, link) in &way.links {
            self.write(&link.tail, wanted, &mut target).await?;
        }
        for tails in &self.tails {
            for link in tails.chain.links.iter().filter(|link| link.tail.from < way.end) {
                let is_used = way.links.iter().any(|(_, used)| content_of(&used.tail) == content_of(&link.tail));
                if !is_used {
                    compare(tails, &link.tail, wanted, &mut target).await?;
                }
            }
        }
        target.finish(wanted.size)
    }

    /// Writes one tail, from the first repository that has these bytes intact.
    async fn write(&self, tail: &TailName, wanted: &Wanted, target: &mut Target) -> Result<(), WalGetError> {
        let mut fault = None;
        let copies = self.tails.iter().flat_map(|tails| tails.holds(tail).map(move |object| (tails, object)));
        for (tails, copy) in copies {
            let mark = target.mark();
            match write_copy(tails, copy, wanted, target).await {
                Err(error) if error.is_of_one_copy() => {
                    target.back_to(mark)?;
                    fault = WalGetError::or_graver(fault, error);
                }
                ended => return ended,
            }
        }
        Err(fault.expect("some repository listed it, and failed"))
    }
}

async fn write_copy(
    tails: &Tails<'_>,
    copy: TailObject,
    wanted: &Wanted,
    target: &mut Target,
) -> Result<(), WalGetError> {
    let archive = &tails.holder.archive;
    let object = tails.object(copy);
    let damaged = |fault: String| object::damaged(archive, &object.key, fault);
    if copy.stored_bytes == 0 {
        return Err(damaged("it is empty".to_string()));
    }
    let crc = object::read(archive, &object, copy.name.from - wanted.start, target, Use::Write).await?;
    if crc != copy.name.raw_crc32 {
        return Err(damaged(format!("its content has CRC-32 {crc:08x}, its name says {:08x}", copy.name.raw_crc32)));
    }
    wanted.check_header(&target.head).map_err(damaged)
}

/// Compares what a tail holds with what is written. One that cannot be read says nothing against it.
async fn compare(tails: &Tails<'_>, tail: &TailName, wanted: &Wanted, target: &mut Target) -> Result<(), WalGetError> {
    let Some(copy) = tails.holds(tail).next() else { return Ok(()) };
    let object = tails.object(copy);
    match object::read(&tails.holder.archive, &object, tail.from - wanted.start, target, Use::Compare).await {
        Err(error) if error.is_of_one_copy() => {
            tracing::warn!(repository = tails.holder.repository, %error, "a tail is not needed, and could not be compared");
            Ok(())
        }
        ended => ended.map(drop),
    }
}
