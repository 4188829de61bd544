//! Owns: catalog against objects, both ways, from listings and index files alone.
//! Does not own: reading them (`listing.rs`), backups (`backups.rs`), objects' content.
//! Pure.

use std::collections::BTreeMap;

use super::listing::{Ground, Seen};
use super::report::{Fault, FaultKind, Notes, Span};
use crate::catalog::contents::segment_span;
use crate::catalog::union::Part;
use crate::catalog::{DirectoryContents, Holdings, IndexEntry, Piece, SegmentObject, Source};
use crate::codec::Form;
use crate::continuity::{self, GapState};
use crate::repository::layout::{Lineage, WalObject, segment_at};
use crate::wal::{Proof, SegmentName, TimelineId};

/// What the directories of a lineage come to, read one after the other.
#[derive(Debug)]
pub struct Survey {
    lineage: Lineage,
    /// What an object would be stored as, where nothing tells.
    form: Form,
    pieces: BTreeMap<TimelineId, Vec<Piece>>,
    /// The highest segment the index knows of, by timeline.
    indexed: BTreeMap<TimelineId, SegmentName>,
    unindexed: Vec<(SegmentName, SegmentObject)>,
    /// WAL of which something is wrong: that it is not there is said once.
    troubled: Vec<Span>,
    /// Damaged objects of before in whose place a good one stands.
    pub repaired: Vec<SegmentName>,
    pub segments: u64,
}

/// What is left when all directories were looked at.
#[derive(Debug)]
pub struct Coverage {
    held: Holdings,
    /// WAL of which something is wrong that was told.
    troubled: Vec<Span>,
}

impl Survey {
    pub fn new(lineage: &Lineage, form: Form) -> Survey {
        Survey {
            lineage: lineage.clone(),
            form,
            pieces: BTreeMap::new(),
            indexed: BTreeMap::new(),
            unindexed: Vec::new(),
            troubled: Vec::new(),
            repaired: Vec::new(),
            segments: 0,
        }
    }

    fn segment_path(&self, name: SegmentName, form: Form) -> String {
        let key = self.lineage.segment(name, form);
        self.lineage.below(&key).unwrap_or(key.as_str()).to_string()
    }

    /// Takes one directory; directories of a timeline in order.
    pub fn add(&mut self, seen: &Seen, notes: &mut Notes) -> Vec<Fault> {
        let contents = &seen.contents;
        let timeline = contents.directory.timeline;
        let mut faults = seen.faults.clone();
        let form = form_of(contents).unwrap_or(self.form);
        for entry in contents.entries.values() {
            self.segments += 1;
            let highest = self.indexed.entry(timeline).or_insert(entry.segment);
            *highest = entry.segment.max(*highest);
            if has_repair(contents, entry) {
                self.repaired.push(entry.segment);
            } else if contents.object_of(entry).is_none() {
                faults.push(self.lacking(contents, entry, form));
            }
            self.note_twins(contents, entry, notes);
        }
        for (name, entries) in &contents.disputed {
            let Some(span) = segment_span(*name, contents.segment_size) else { continue };
            let crcs: Vec<String> = entries.iter().map(|entry| format!("{:08x}", entry.raw_crc32.0)).collect();
            let what = format!("index entries disagree on what it holds: CRC-32 {}", crcs.join(" and "));
            let fault = Fault::new(self.segment_path(*name, form), FaultKind::Conflict, what);
            faults.push(fault.of_wal(Span::new(name.timeline, span.start, span.end)));
        }
        for (name, found) in &contents.conflicts {
            for (crc32, object) in found {
                let key = self.lineage.conflict(*name, *crc32, object.form);
                let path = self.lineage.below(&key).unwrap_or(key.as_str()).to_string();
                faults.push(Fault::new(path, FaultKind::Conflict, format!("a second content for segment {name}")));
            }
        }
        self.tails(contents, &mut faults, notes);
        self.unindexed.extend(contents.unindexed());
        self.troubled.extend(faults.iter().filter_map(|fault| fault.wal));
        let pieces = self.pieces.entry(timeline).or_default();
        contents.pieces().into_iter().for_each(|piece| merge(pieces, piece));
        faults
    }

    /// An entry without the object it describes.
    fn lacking(&self, contents: &DirectoryContents, entry: &IndexEntry, form: Form) -> Fault {
        let name = entry.segment;
        let there = contents.segments.get(&name).and_then(|objects| objects.first());
        let fault = match there {
            None => {
                Fault::new(self.segment_path(name, form), FaultKind::Missing, "the index names it, and it is not there")
            }
            Some(object) => {
                let (found, expected) = (object.stored_bytes, entry.stored_bytes);
                let what = format!("it has {found} bytes, the index says {expected}");
                Fault::new(self.segment_path(name, object.form), FaultKind::Size, what)
            }
        };
        fault.of_wal(Span::of(entry))
    }

    fn note_twins(&self, contents: &DirectoryContents, entry: &IndexEntry, notes: &mut Notes) {
        let several = contents.segments.get(&entry.segment).filter(|objects| objects.len() > 1);
        if several.is_some() {
            notes.add(format!("segment {} is there plain and encrypted: no writer does that", entry.segment));
        }
    }

    fn tails(&self, contents: &DirectoryContents, faults: &mut Vec<Fault>, notes: &mut Notes) {
        for (name, tails) in &contents.tails {
            if contents.sealed(*name).is_some() {
                continue; // superseded, and soon deleted
            }
            let path = |tail| {
                let key = self.lineage.tail(*name, tail);
                self.lineage.below(&key).unwrap_or(key.as_str()).to_string()
            };
            for tail in tails.iter().filter(|tail| tail.stored_bytes == 0) {
                let span = Span::new(name.timeline, tail.name.from, tail.name.to);
                faults.push(Fault::new(path(&tail.name), FaultKind::Size, "it is empty").of_wal(span));
            }
            let chain = contents.tail_chain(*name);
            for refused in &chain.refused {
                let what =
                    format!("{} does not count: a later writer's bytes differ, or cannot be compared", path(refused));
                notes.add(what);
            }
            for pair in chain.links.windows(2).filter(|pair| pair[0].to < pair[1].from) {
                let (from, to) = (pair[0].to, pair[1].from);
                let key = self.lineage.tail_directory(*name);
                let directory = self.lineage.below(&key).unwrap_or(key.as_str());
                let what = format!("its tails hold nothing of {from} to {to}, and go on behind it");
                let fault = Fault::new(directory, FaultKind::Missing, what).indirect();
                faults.push(fault.of_wal(Span::new(name.timeline, from, to)));
            }
        }
    }

    /// All directories were taken. `is_alone`: no other repository may hold what this one lacks.
    pub fn finish(mut self, ground: &Ground, is_alone: bool, notes: &mut Notes) -> (Vec<Fault>, Coverage) {
        let mut faults = histories(&self.lineage, ground, self.pieces.keys().copied());
        faults.extend(self.orphans(ground));
        self.troubled.extend(faults.iter().filter_map(|fault| fault.wal));
        let size = ground.file.segment_size;
        let expired = self.pieces.keys().map(|&timeline| (timeline, ground.expired.lsns(timeline, size))).collect();
        let held = Holdings {
            segment_size: size,
            start_timeline: ground.file.start_timeline,
            start_lsn: ground.file.start_lsn,
            histories: ground.histories.clone(),
            parts: self.pieces.into_iter().map(|(timeline, pieces)| (timeline, parts(pieces))).collect(),
            ledger: ground.ledger.clone(),
            expired,
            disputed: Default::default(),
        };
        for gap in continuity::gaps_of(&held).into_iter().filter(|gap| gap.state == GapState::Open) {
            let span = Span::new(gap.timeline, gap.from, gap.to);
            let mut goes_on = held.parts.range(gap.timeline..).flat_map(|(_, parts)| parts).map(Part::span);
            let is_end = !goes_on.any(|held| held.from >= size.floor(gap.to));
            if is_end || self.troubled.iter().any(|troubled| troubled.overlaps(&span)) {
                continue;
            }
            let place = format!("{} to {} of timeline {}", gap.from, gap.to, gap.timeline);
            match (&gap.cause, is_alone) {
                (Some(cause), _) => notes.add(format!("gap {place}, which is known: {cause} (`seawall gaps`)")),
                (None, false) => {
                    notes.add(format!("{place} is not here; another repository may hold it (`seawall gaps`)"));
                }
                (None, true) => {
                    let name = segment_at(gap.timeline, gap.from, size);
                    let key = self.lineage.segment(name, self.form);
                    let object = self.lineage.below(&key).unwrap_or(key.as_str());
                    let what = format!("nothing holds {place}, and the ledger knows no reason");
                    faults.push(Fault::new(object, FaultKind::Hole, what).of_wal(span));
                    self.troubled.push(span);
                }
            }
        }
        (faults, Coverage { held, troubled: self.troubled })
    }

    /// Objects no entry describes, below segments that are indexed. Above them it is one whose entry is still to come.
    fn orphans(&self, ground: &Ground) -> Vec<Fault> {
        let size = ground.file.segment_size;
        let is_below = |name: &SegmentName| self.indexed.get(&name.timeline).is_some_and(|highest| name < highest);
        let mut faults = Vec::new();
        for (name, object) in self.unindexed.iter().filter(|(name, _)| is_below(name)) {
            let Some(span) = segment_span(*name, size) else { continue };
            let span = Span::new(name.timeline, span.start, span.end);
            // The index file that cannot be read is what is wrong.
            let is_explained = ground.faults.iter().filter_map(|fault| fault.wal).chain(self.troubled.iter().copied());
            if is_explained.into_iter().any(|troubled| troubled.overlaps(&span)) {
                continue;
            }
            let what = "no index names it, though the index goes on behind it: nothing reads it";
            faults.push(Fault::new(self.segment_path(*name, object.form), FaultKind::Unindexed, what).of_wal(span));
        }
        faults
    }
}

impl Coverage {
    /// Whether a part of the span is missing that no fault tells of.
    pub fn lacks_silently(&self, span: &Span) -> bool {
        let mut held = self.held.parts(span.timeline).iter().map(Part::span);
        let is_held = held.any(|held| held.from <= span.from && span.to <= held.to);
        !is_held && !self.troubled.iter().any(|troubled| troubled.overlaps(span))
    }
}

fn parts(pieces: Vec<Piece>) -> Vec<Part> {
    pieces.into_iter().map(Part::Piece).collect()
}

/// Contiguous pieces become one: only where they begin and end is looked at.
fn merge(pieces: &mut Vec<Piece>, piece: Piece) {
    match pieces.last_mut() {
        Some(last) if last.to == piece.from => {
            last.to = piece.to;
            last.last_commit = piece.last_commit.or(last.last_commit);
            if piece.proof == Proof::Unproven {
                last.proof = Proof::Unproven;
            }
            if let Source::Sealed(_) = piece.source {
                last.source = piece.source;
            }
        }
        _ => pieces.push(piece),
    }
}

fn form_of(contents: &DirectoryContents) -> Option<Form> {
    contents.segments.values().flatten().next().map(|object| object.form)
}

/// Readers take it instead.
pub fn has_repair(contents: &DirectoryContents, entry: &IndexEntry) -> bool {
    let repairs = contents.repairs.get(&entry.segment);
    repairs.into_iter().flatten().any(|(crc32, object)| *crc32 == entry.raw_crc32.0 && object.stored_bytes > 0)
}

/// Every timeline that has data is known by its history, and histories agree on what they share.
fn histories(lineage: &Lineage, ground: &Ground, with_data: impl Iterator<Item = TimelineId>) -> Vec<Fault> {
    let path = |timeline: TimelineId| {
        let key = lineage.history(timeline);
        lineage.below(&key).unwrap_or(key.as_str()).to_string()
    };
    let mut faults = Vec::new();
    for timeline in with_data {
        let is_told = ground.faults.iter().any(|fault| fault.object == path(timeline));
        let known = continuity::path_of(timeline, &ground.histories, ground.file.start_timeline);
        if known.is_none() && !is_told {
            let what = format!("timeline {timeline} has WAL here, and nothing says where it left its parent");
            faults.push(Fault::new(path(timeline), FaultKind::Missing, what));
        }
    }
    for (timeline, history) in &ground.histories {
        for (ancestor, of_ancestor) in ground.histories.iter().filter(|(other, _)| history.contains(**other)) {
            let differs = history.up_to(*ancestor).is_some_and(|upto| upto != *of_ancestor);
            if ancestor != timeline && differs {
                let what = format!("it tells timeline {ancestor} another past than {} does", path(*ancestor));
                faults.push(Fault::new(path(*timeline), FaultKind::Record, what));
            }
        }
    }
    faults
}

/// The object that readers take for a sealed segment, with its raw CRC-32 where that is a repair's.
pub fn readable(contents: &DirectoryContents, entry: &IndexEntry) -> Option<(WalObject, SegmentObject)> {
    let repairs = contents.repairs.get(&entry.segment).into_iter().flatten();
    let good = |&&(crc32, object): &&(u32, SegmentObject)| crc32 == entry.raw_crc32.0 && object.stored_bytes > 0;
    if let Some(&(crc32, object)) = repairs.into_iter().find(good) {
        return Some((WalObject::Repair(entry.segment, crc32, object.form), object));
    }
    let object = contents.object_of(entry)?;
    Some((WalObject::Segment(entry.segment, object.form), object))
}
