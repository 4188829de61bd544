//! Owns: what was typed, in the file, in variables and on the command line, layered into one tree of known keys.
//! Does not own: what the values mean (`mod.rs`).
//!
//! Tables are walked by hand, not through serde: every value keeps its place, and an unknown key is named with its
//! line and its nearest neighbour.

use std::collections::BTreeMap;
use std::path::Path;

use toml::de::{DeTable, DeValue};

use super::error::{ConfigError, Source};
use super::reference::{Group, LATER_TABLES, nearest};
use crate::postgres::Environment;

const VARIABLE_PREFIX: &str = "SEAWALL__";
const NAME_BYTES_MAX: usize = 40;
/// Two ways to say the same: a later layer that uses one replaces the other.
const ALTERNATIVES: [&str; 2] = ["postgres", "postgres_file"];

/// A value as typed. Not `Debug`: it may be a connection string with a password.
#[derive(Clone)]
pub(super) enum Value {
    Text(String),
    List(Vec<String>),
    /// A type no key has: its TOML name, for the error.
    Other(&'static str),
}

#[derive(Clone)]
pub(super) struct Typed {
    pub value: Value,
    pub source: Source,
}

pub(super) type Table = BTreeMap<&'static str, Typed>;

/// All tables, by group and name.
#[derive(Clone, Default)]
pub(super) struct Tree(BTreeMap<Group, BTreeMap<String, Table>>);

impl Tree {
    pub fn tables(&self, group: Group) -> impl Iterator<Item = (&String, &Table)> {
        self.0.get(&group).into_iter().flatten()
    }

    pub fn table(&self, group: Group, name: &str) -> Option<&Table> {
        self.0.get(&group)?.get(name)
    }

    pub fn names(&self, group: Group) -> Vec<String> {
        self.tables(group).map(|(name, _)| name.clone()).collect()
    }

    /// Layers are applied in order, so that what comes last wins.
    pub fn set(&mut self, group: Group, name: &str, key: &'static str, typed: Typed) {
        let table = self.declare(group, name);
        if ALTERNATIVES.contains(&key) {
            let same_layer =
                |other: &Typed| std::mem::discriminant(&other.source) == std::mem::discriminant(&typed.source);
            table.retain(|other, value| !ALTERNATIVES.contains(other) || same_layer(value));
        }
        table.insert(key, typed);
    }

    fn declare(&mut self, group: Group, name: &str) -> &mut Table {
        self.0.entry(group).or_default().entry(name.to_string()).or_default()
    }

    /// A cluster that only `--cluster` names.
    pub fn declare_flagged(&mut self, name: &str) -> Result<(), ConfigError> {
        check_name(Group::Clusters, name, &Source::Flag("--cluster"))?;
        self.declare(Group::Clusters, name);
        Ok(())
    }

    /// The lowest layer: a TOML document.
    pub fn add_file(&mut self, text: &str, path: &Path) -> Result<(), ConfigError> {
        let file = File { text, path };
        let document = DeTable::parse(text).map_err(|error| ConfigError::Syntax {
            source_place: file.place(error.span().map_or(0, |span| span.start)),
            // Without toml's excerpt of the line, which may hold a password.
            problem: error.message().to_string(),
        })?;
        for (key, value) in document.get_ref() {
            let place = file.place(key.span().start);
            let Some(group) = Group::ALL.into_iter().find(|group| group.name() == key.get_ref().as_ref()) else {
                return Err(unknown_table(key.get_ref(), place));
            };
            self.add_group(group, value.get_ref(), place, &file)?;
        }
        Ok(())
    }

    fn add_group(&mut self, group: Group, value: &DeValue<'_>, place: Source, file: &File) -> Result<(), ConfigError> {
        let tables = value.as_table().ok_or_else(|| not_a_table(group.name(), group, place))?;
        for (name, value) in tables {
            let place = file.place(name.span().start);
            let name = name.get_ref();
            check_name(group, name, &place)?;
            let full = format!("{}.{name}", group.name());
            let table = value.get_ref().as_table().ok_or_else(|| not_a_table(&full, group, place))?;
            self.declare(group, name);
            for (key, value) in table {
                let source = file.place(key.span().start);
                let key = known_key(group, name, key.get_ref(), &source)?;
                self.set(group, name, key, Typed { value: typed(value.get_ref()), source });
            }
        }
        Ok(())
    }

    /// `SEAWALL__CLUSTERS__MAIN__SLOT=…`; lists are comma-separated.
    pub fn add_variables(&mut self, environment: &dyn Environment) -> Result<(), ConfigError> {
        for (variable, text) in environment.vars(VARIABLE_PREFIX) {
            let source = Source::Variable(variable.clone());
            let (group, name, key) = variable_path(&variable, &source)?;
            check_name(group, &name, &source)?;
            let key = known_key(group, &name, &key, &source)?;
            let value = match key {
                "repositories" => Value::List(text.split(',').map(|name| name.trim().to_string()).collect()),
                _ => Value::Text(text),
            };
            self.set(group, &name, key, Typed { value, source });
        }
        Ok(())
    }
}

struct File<'a> {
    text: &'a str,
    path: &'a Path,
}

impl File<'_> {
    fn place(&self, offset: usize) -> Source {
        let before = &self.text.as_bytes()[..offset.min(self.text.len())];
        let line = 1 + before.iter().filter(|byte| **byte == b'\n').count();
        Source::File { path: self.path.to_path_buf(), line }
    }
}

fn typed(value: &DeValue<'_>) -> Value {
    match value {
        DeValue::String(text) => Value::Text(text.to_string()),
        DeValue::Array(values) => {
            let texts: Option<Vec<String>> =
                values.iter().map(|value| value.get_ref().as_str().map(str::to_string)).collect();
            texts.map_or(Value::Other("list of other things"), Value::List)
        }
        other => Value::Other(other.type_str()),
    }
}

/// Splits at the first and last `__`: names hold none, keys neither begin nor end with `_`.
fn variable_path(variable: &str, source: &Source) -> Result<(Group, String, String), ConfigError> {
    let unknown = |nearest: Option<String>| ConfigError::UnknownKey {
        source_place: source.clone(),
        key: variable.to_string(),
        nearest,
    };
    let path = variable.strip_prefix(VARIABLE_PREFIX).unwrap_or(variable).to_lowercase();
    let (head, rest) = path.split_once("__").unwrap_or((&path, ""));
    let Some(group) = Group::ALL.into_iter().find(|group| group.name() == head) else {
        if LATER_TABLES.contains(&head) {
            return Err(ConfigError::NotAvailable { source_place: source.clone(), what: format!("[{head}] is") });
        }
        let group = nearest(head, Group::ALL.into_iter().map(Group::name));
        return Err(unknown(group.map(|group| format!("{VARIABLE_PREFIX}{}__…", group.to_uppercase()))));
    };
    let example = || Some(format!("{VARIABLE_PREFIX}{}__NAME__KEY", group.name().to_uppercase()));
    let (name, key) = rest.rsplit_once("__").ok_or_else(|| unknown(example()))?;
    Ok((group, name.to_string(), key.to_string()))
}

fn unknown_table(key: &str, source_place: Source) -> ConfigError {
    if LATER_TABLES.contains(&key) {
        return ConfigError::NotAvailable { source_place, what: format!("[{key}] is") };
    }
    let near = nearest(key, Group::ALL.into_iter().map(Group::name));
    ConfigError::UnknownKey { source_place, key: key.to_string(), nearest: near.map(str::to_string) }
}

fn not_a_table(key: &str, group: Group, source_place: Source) -> ConfigError {
    let expected = format!("a table: [{}.NAME]", group.name());
    ConfigError::Invalid { source_place, key: key.to_string(), value: None, expected }
}

/// The key's name from the table, so that nothing that is not documented can be accepted.
fn known_key(group: Group, name: &str, key: &str, source: &Source) -> Result<&'static str, ConfigError> {
    if let Some((known, _)) = group.find(key) {
        return Ok(known);
    }
    let full = |key: &str| format!("{}.{name}.{key}", group.name());
    let source_place = source.clone();
    if group.later().contains(&key) {
        return Err(ConfigError::NotAvailable { source_place, what: full(key) + " is" });
    }
    let nearest = group.nearest(key).map(str::to_string);
    Err(ConfigError::UnknownKey { source_place, key: full(key), nearest })
}

/// Names become directories and parts of variables.
fn check_name(group: Group, name: &str, source: &Source) -> Result<(), ConfigError> {
    let plain = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'_';
    let fits = (1..=NAME_BYTES_MAX).contains(&name.len());
    if fits && name.bytes().all(plain) && !name.contains("__") {
        return Ok(());
    }
    Err(ConfigError::Invalid {
        source_place: source.clone(),
        key: format!("name in {}", group.name()),
        value: Some(name.to_string()),
        expected: "1 to 40 characters a-z, 0-9 and _, without __".to_string(),
    })
}
